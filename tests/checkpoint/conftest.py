"""Small checkpoints, and the means to write files that no honest tool would write."""

from __future__ import annotations

import json

import pytest
import torch

from eutectic.checkpoint.spec import DTYPES


def tensors_of_all_dtypes():
    torch.manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.rand(5, 7) * 100
        tensors[f"w.{name}"] = values.gt(50) if dtype is torch.bool else values.to(dtype)
    return tensors


@pytest.fixture
def tensors():
    """All dtypes, a scalar, and shapes without elements."""
    return {
        **tensors_of_all_dtypes(),
        "scalar": torch.tensor(3.5),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "hollow": torch.empty(3, 0, 2),
        "cube": torch.rand(4, 3, 2),
    }


@pytest.fixture
def write_raw():
    """A function that writes a safetensors file from any header and data."""

    def write(path, header, data=b"", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def assert_reads():
    """A function that reads a checkpoint whole, by rows and flat, and compares it bit for bit with tensors."""

    def check(checkpoint, tensors):
        assert {name: (spec.shape, spec.dtype) for name, spec in checkpoint.specs.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            assert_same(checkpoint.read(name), tensor)
            first = min(1, tensor.numel())
            assert_same(checkpoint.read_flat(name, first, tensor.numel()), tensor.reshape(-1)[first:])
            if tensor.dim():
                assert_same(checkpoint.read(name, slice(1, 3)), tensor[1:3])
                assert_same(checkpoint.read(name, slice(2, 2)), tensor[2:2])

    return check


def assert_same(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert bits(found) == bits(wanted)


def bits(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.reshape(-1))
    return bytes(flat.view(torch.uint8).numpy())
