"""What a merge will cost, from headers alone, and whether it fits the memory that it may take."""

from __future__ import annotations

import re
from typing import NamedTuple

from eutectic.checkpoint.save import need_bytes, units
from eutectic.checkpoint.spec import layout_nbytes
from eutectic.errors import BudgetError
from eutectic.merge._memory import resident_bytes
from eutectic.merge.adapters import Fused
from eutectic.merge.compose import Composed
from eutectic.merge.view import Merged

#: for what grows with neither chunks nor tensors: libraries at first use, histograms, hashes, memory that lies in pieces
SLACK_BYTES = 192 << 20
#: what a merge may take if nobody says; more only for a tensor that needs it
DEFAULT_BYTES = 3 << 29


class Plan(NamedTuple):
    """Counts and bytes of one merge.

    ``read_bytes`` counts every pass over the inputs.  ``process_bytes`` is in use before the merge begins, ``work_bytes`` what
    its threads may take beside that, and ``largest`` the tensor that needs most, ``largest_bytes``, at once.
    """

    tensors: int
    merged_tensors: int
    parameters: int
    passes: int
    read_bytes: int
    write_bytes: int
    process_bytes: int
    work_bytes: int
    largest: str
    largest_bytes: int

    @property
    def peak_bytes(self) -> int:
        """An upper bound of the memory that the process will have taken at its peak."""
        return self.process_bytes + self.work_bytes + SLACK_BYTES


def plan(merged: Merged | Composed | Fused, memory_bytes: int | None = None, threads: int = 2) -> Plan:
    """The plan of a merge; reads no tensor.

    ``memory_bytes`` is what the whole process may take: by default 1.5 GiB, or what the largest tensor takes if that is more.
    Raises BudgetError if the largest tensor does not fit into what was asked for, with the budget that would do.
    """
    needs = {unit[0].name: need_bytes(merged, unit) for unit in units(merged)}
    largest = max(needs, key=needs.__getitem__, default="")
    most, process = needs.get(largest, 0), resident_bytes()
    free = (memory_bytes or DEFAULT_BYTES) - process - SLACK_BYTES
    if memory_bytes is not None and free < most:
        enough = -(-(process + SLACK_BYTES + most) // (1 << 20))
        raise BudgetError(
            f"{merged.method}: {largest!r} {merged.specs[largest]} takes {most / 2**20:,.0f} MiB at once, beside "
            f"{(process + SLACK_BYTES) / 2**20:,.0f} MiB for the process: more than {memory_bytes / 2**20:,.0f} MiB. "
            f"Give it {enough}MiB or more"
        )
    floats = [spec for spec in merged.specs.values() if spec.dtype.is_floating_point]
    return Plan(
        tensors=len(merged.specs),
        merged_tensors=len(floats),
        parameters=sum(spec.numel for spec in merged.specs.values()),
        passes=merged.passes(),
        read_bytes=merged.passes() * sum(layout_nbytes(c.specs) for c in merged.inputs.values()),
        write_bytes=layout_nbytes(merged.specs),
        process_bytes=process,
        work_bytes=min(threads * most, max(most, free)),
        largest=largest,
        largest_bytes=most,
    )


def bytes_of(text: str) -> int:
    """``2GiB``, ``800 MiB``, ``1.5G`` … in bytes; K, M, G and T are powers of 1,024.  Raises BudgetError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise BudgetError(f"{text!r} is no amount of memory; write it like 2GiB or 800MiB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
