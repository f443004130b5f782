"""What a merge will cost, from headers alone."""

from __future__ import annotations

from typing import NamedTuple

from eutectic.checkpoint.spec import layout_nbytes
from eutectic.merge.compose import Composed
from eutectic.merge.view import Merged


class Plan(NamedTuple):
    """Counts and bytes of one merge.  ``read_bytes`` counts every pass over the inputs."""

    tensors: int
    merged_tensors: int
    parameters: int
    passes: int
    read_bytes: int
    write_bytes: int
    working_bytes: int


def plan(merged: Merged | Composed, workers: int = 2) -> Plan:
    """The plan of a merge; reads no tensor.  ``working_bytes`` is the arithmetic's memory beyond the process itself."""
    inputs = list(merged.inputs.values())
    floats = [spec for spec in merged.specs.values() if spec.dtype.is_floating_point]
    chunk = min(merged.chunk, max((spec.numel for spec in floats), default=0))
    return Plan(
        tensors=len(merged.specs),
        merged_tensors=len(floats),
        parameters=sum(spec.numel for spec in merged.specs.values()),
        passes=merged.passes(),
        read_bytes=merged.passes() * sum(layout_nbytes(c.specs) for c in inputs),
        write_bytes=layout_nbytes(merged.specs),
        # float32 experts, base and result, and as much again in temporaries
        working_bytes=workers * chunk * 4 * 2 * (len(inputs) + 2),
    )
