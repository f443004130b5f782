"""The inner loops that array operations leave slow: compiled where there was a compiler, and the same bits where not.

``_native.c`` says what each does.  Tensors are contiguous; those that are no float32 or bfloat16 take the other way.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("eutectic.methods._native_loops")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    at, count, u64, f64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double
    for name in ("widen_bf16", "widen_f32", "narrow_bf16", "narrow_f32"):
        getattr(library, f"eutectic_{name}").argtypes = [at, at, at, count]
    library.eutectic_count_high.argtypes = [at, count, at]
    library.eutectic_count_low.argtypes = [at, count, ctypes.c_uint32, at]
    library.eutectic_band.argtypes = [at, count, ctypes.c_uint32, ctypes.c_uint32, at]
    library.eutectic_sum.argtypes = [at, count, count, at, at]
    library.eutectic_agree.argtypes = [at, count, count, at, at]
    library.eutectic_spread.argtypes = [at, count, count, at]
    library.eutectic_dots.argtypes = [at, at, count, at]
    library.eutectic_random.argtypes = [u64, u64, count, count, at]
    library.eutectic_toss.argtypes = [at, at, count, u64, ctypes.c_float, at]
    library.eutectic_magprune.argtypes = [at, at, count, count, f64, f64, at]
    return library


#: None without a compiler: then everything below is array operations
LIBRARY = _load()


def widen(x: Tensor, minus: Tensor | None, out: Tensor) -> bool:
    """``out = x − minus``, or x, in out's dtype; returns whether x is finite everywhere."""
    if LIBRARY and out.dtype == torch.float32 and x.dtype in _NAMES and x.is_contiguous():
        run = getattr(LIBRARY, f"eutectic_widen_{_NAMES[x.dtype]}")
        return bool(run(x.data_ptr(), _pointer(minus), out.data_ptr(), x.numel()))
    out.copy_(x)
    whole = finite(out)
    if minus is not None:
        out.sub_(minus)
    return whole


def narrow(x: Tensor, base: Tensor | None, out: Tensor) -> bool:
    """``out = x + base``, or x, rounded to out's dtype; where x is 0, the base as it is.  Returns whether all is finite."""
    if LIBRARY and _fits(x) and out.dtype in _NAMES:
        run = getattr(LIBRARY, f"eutectic_narrow_{_NAMES[out.dtype]}")
        return bool(run(x.data_ptr(), _pointer(base), out.data_ptr(), x.numel()))
    out.copy_(x if base is None else torch.where(x == 0, base, x + base))
    return finite(out)


def finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    x = x.float() if x.itemsize == 1 else x
    # one cheap sum finds any; only if it is odd do we look closely, since a sum of finite numbers may overflow
    return bool(torch.isfinite(x.sum(dtype=torch.float32)) or torch.isfinite(x).all())


def count_high(bits: Tensor, counts: Tensor) -> None:
    """Add to ``counts``, int64 ``[2¹⁵]``, how often each upper half occurs among magnitudes, given as int32 bits."""
    if LIBRARY:
        LIBRARY.eutectic_count_high(bits.data_ptr(), bits.numel(), counts.data_ptr())
    else:
        counts += torch.bincount((bits & 0x7FFFFFFF) >> 16, minlength=1 << 15)


def count_low(bits: Tensor, high: int, counts: Tensor) -> None:
    """Add to ``counts``, int64 ``[2¹⁶]``, how often each lower half occurs among the magnitudes with that upper half."""
    if LIBRARY:
        LIBRARY.eutectic_count_low(bits.data_ptr(), bits.numel(), high, counts.data_ptr())
    else:
        counts += torch.bincount(bits[(bits & 0x7FFFFFFF) >> 16 == high] & 0xFFFF, minlength=1 << 16)


def band(x: Tensor, least: int, most: int = 0x7FFFFFFF) -> Tensor:
    """``x`` where the bits of its magnitude lie in ``least … most``, else 0."""
    if LIBRARY and _fits(x):
        out = torch.empty_like(x)
        LIBRARY.eutectic_band(x.data_ptr(), x.numel(), least, most, out.data_ptr())
        return out
    bits = x.float().view(torch.int32) & 0x7FFFFFFF
    return torch.where((bits >= least) & (bits <= most), x, 0)


def total(x_K: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Σ w x over the rows of ``[K, …]``, without weights Σ x, added in their order.

    ``sum(0)`` adds whole vectors and remainders in different orders; this gives an element the same bits whatever lies
    beside it.
    """
    if LIBRARY and _fits(x_K):
        out = torch.empty_like(x_K[0])
        w_K = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        LIBRARY.eutectic_sum(x_K.data_ptr(), len(x_K), out.numel(), _pointer(w_K), out.data_ptr())
        return out
    return functools.reduce(torch.add, x_K if weights is None else (x * w for x, w in zip(x_K, weights, strict=True)))


def agree(x_K: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Of ``[K, …]``, the entries that agree in sign with the sum of all: Σ w x / Σ |w|, without weights the mean; 0 if none."""
    if LIBRARY and _fits(x_K):
        out = torch.empty_like(x_K[0])
        w_K = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        LIBRARY.eutectic_agree(x_K.data_ptr(), len(x_K), out.numel(), _pointer(w_K), out.data_ptr())
        return out
    sign = torch.sign(functools.reduce(torch.add, x_K))
    kept_K = torch.relu(x_K * sign).mul_(sign)
    w_K = [1.0] * len(x_K) if weights is None else weights
    total = functools.reduce(torch.add, (x * w for x, w in zip(kept_K, w_K, strict=True)))
    mass = functools.reduce(torch.add, ((x != 0).to(x.dtype) * abs(w) for x, w in zip(kept_K, w_K, strict=True)))
    return total / torch.where(mass > 0, mass, 1)


def spread(x_K: Tensor) -> Tensor:
    """Σ (x − mean)² over the experts, rounded from float64 to float32: equal ones tie, in whatever order the experts come."""
    if LIBRARY and _fits(x_K):
        out = torch.empty_like(x_K[0])
        LIBRARY.eutectic_spread(x_K.data_ptr(), len(x_K), out.numel(), out.data_ptr())
        return out
    wide_K = x_K.double()
    mean = functools.reduce(torch.add, wide_K) / len(x_K)
    return functools.reduce(torch.add, ((x - mean) * (x - mean) for x in wide_K)).float()


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y over blocks of 4,096 entries, float64 ``[⌈n / 4096⌉]``; halves of what is left are added until one is."""
    blocks = -(-x.numel() // 4096)
    if LIBRARY and _fits(x) and _fits(y):
        out = torch.empty(blocks, dtype=torch.float64)
        LIBRARY.eutectic_dots(x.data_ptr(), y.data_ptr(), x.numel(), out.data_ptr())
        return out
    sums = torch.nn.functional.pad((x.double() * y.double()).flatten(), (0, 4096 * blocks - x.numel())).view(blocks, 4096)
    while sums.shape[1] > 1:
        sums = torch.add(*sums.chunk(2, dim=1))
    return sums[:, 0]


def random_uint32(key: tuple[int | str, ...], start: int, n: int) -> np.ndarray:
    """Numbers ``start … start + n`` of the Philox-4x64 stream named by ``key``, uniform in 32 bits.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    if LIBRARY:
        out = np.empty(n, dtype=np.uint32)
        words = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
        LIBRARY.eutectic_random(*words, start, n, out.ctypes.data)
        return out
    per_counter = 8  # one counter makes four 64-bit words
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=start // per_counter)
    skip = start % per_counter
    return stream.random_raw(-(-(skip + n) // 2)).view(np.uint32)[skip : skip + n]


def toss(x: Tensor, coins: np.ndarray, p: float) -> Tensor:
    """``x / p`` where the entry's coin, of probability p, says so; else 0."""
    if LIBRARY and _fits(x):
        out = torch.empty_like(x)
        threshold = math.ceil(p * 2.0**32)
        LIBRARY.eutectic_toss(x.data_ptr(), coins.ctypes.data, x.numel(), threshold, p, out.data_ptr())
        return out
    keep = torch.from_numpy(coins < p * 2.0**32).view(x.shape)
    return torch.where(keep, x / torch.tensor(p, dtype=x.dtype), 0)


def magprune(x: Tensor, coins: np.ndarray, least: float, step: float) -> Tensor:
    """Per row of ``[rows, n]``: the entry of magnitude rank r is kept with p = least + step · r, and divided by it; else 0.

    Rank 0 is the smallest; equal magnitudes rank by their place.
    """
    if LIBRARY and _fits(x):
        out = torch.empty_like(x)
        if LIBRARY.eutectic_magprune(x.data_ptr(), coins.ctypes.data, *x.shape, least, step, out.data_ptr()):
            return out
    rank = torch.argsort(torch.argsort(x.abs(), dim=-1, stable=True), dim=-1)
    p = least + step * rank.double()
    keep = torch.from_numpy(coins).view(x.shape).double() < p * 2.0**32
    return torch.where(keep, x / p.to(x.dtype), 0)


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
