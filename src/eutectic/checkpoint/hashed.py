"""Content hashes that come for free: taken of what is read anyway, in whatever order and by however many threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

from blake3 import blake3
from torch import Tensor

from eutectic.checkpoint.base import Checkpoint, Span, Spread, Thin, element_bytes
from eutectic.checkpoint.spec import Layout

#: Elements of a leaf.  Those that lie within a read as a whole are hashed as they pass.
LEAF = 1 << 18


class Leaf(NamedTuple):
    """The hash of a leaf, and the sum of its squares where that was asked for."""

    digest: bytes
    square: float = 0.0


Leaves = dict[str, dict[int, Leaf]]  # tensor → place of a leaf → its hash


@final
class Hashed(Checkpoint):
    """The checkpoint below, unchanged, whose tensors are hashed as they are read.

    A tensor's hash is BLAKE3 (O'Connor et al., 2020) over the BLAKE3 hashes of its leaves of 262,144 elements.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Nothing is read now."""
        self._below, self.origin = checkpoint, checkpoint.origin
        self.files, self.durable = checkpoint.files, checkpoint.durable
        self._leaves: Leaves = {name: {} for name in checkpoint.specs}

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew, and so notes what it reads itself."""
        return self.__dict__ | {"_leaves": {name: {} for name in self._leaves}}

    @property
    def specs(self) -> Layout:
        """As below."""
        return self._below.specs

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self.read_spans([Span(name, start, stop)])

    def read_spans(self, spans: Sequence[Span]) -> Tensor:
        """As below."""
        flat = self._below.read_spans(spans)
        data, size, at = element_bytes(flat), flat.element_size(), 0
        for name, start, stop in spans:
            leaves = self._leaves[name]
            first, last = -(-start // LEAF), -(-stop // LEAF) if stop == self.specs[name].numel else stop // LEAF
            if first < last and not (first in leaves and last - 1 in leaves):
                low, high = at + first * LEAF - start, at + min(last * LEAF, stop) - start
                leaves.update(enumerate(leaf_hashes(data[low * size : high * size], size), first))
            at += stop - start
        return flat

    def thin(self, name: str) -> Thin | None:
        """As below; what is read for it is not hashed."""
        return self._below.thin(name)

    def prepare(self, names: Sequence[str], spread: Spread = map) -> None:
        """As below."""
        self._below.prepare(names, spread)

    def need_bytes(self, name: str, n: int) -> int:
        """As below."""
        return self._below.need_bytes(name, n)

    def grain(self, name: str) -> int:
        """As below."""
        return self._below.grain(name)

    def tensor_hash(self, name: str) -> str:
        """The hash of one tensor's elements; reads what has not passed yet."""
        leaves, numel = self._leaves[name], self.specs[name].numel
        count = -(-numel // LEAF)
        for leaf in range(count):
            if leaf not in leaves:
                self._read(name, leaf * LEAF, min((leaf + 1) * LEAF, numel))
        return root_hash([leaves[leaf] for leaf in range(count)])

    def fingerprint(self) -> str:
        """One hash over names, shapes, dtypes and elements, in name order; reads what has not passed yet.

        Equal contents have equal fingerprints, however they are sharded or stored.
        """
        whole = blake3()
        for name in sorted(self.specs):
            whole.update(f"{name}\0{self.specs[name]}\0{self.tensor_hash(name)}\n".encode())
        return whole.hexdigest()

    def noted(self) -> Leaves:
        """The hashes of the leaves that have passed."""
        return {name: found for name, found in self._leaves.items() if found}

    def absorb(self, leaves: Mapping[str, Mapping[int, Leaf]]) -> None:
        """Note what passed through a copy elsewhere, as if it had passed here."""
        for name, found in leaves.items():
            self._leaves[name].update(found)

    def untouched(self) -> bool:
        """Whether nothing was hashed yet."""
        return not any(self._leaves.values())

    def close(self) -> None:
        """Close the checkpoint below."""
        self._below.close()


def leaf_hashes(data: memoryview, size: int) -> list[Leaf]:
    """The hashes of the leaves of a chunk that begins at a leaf's beginning, of its bytes and those of an element."""
    step = LEAF * size
    return [Leaf(blake3(data[at : at + step]).digest()) for at in range(0, len(data), step)]


def root_hash(leaves: Iterable[Leaf]) -> str:
    """The hash of a tensor from those of its leaves, in order."""
    return blake3(b"".join(leaf.digest for leaf in leaves)).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """``Hashed.fingerprint`` of a checkpoint, which is read once for it."""
    return Hashed(checkpoint).fingerprint()
