"""The process's memory: how much it has, and keeping what is freed for the next chunk."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let glibc reuse buffers of up to 8 MiB, those of chunks, for the rest of the process; does nothing elsewhere.

    By default it hands each large buffer back to the kernel, which clears it anew for the next: that takes ten times as long as
    to fill it, and is most of the time of a merge.  Larger ones, of whole tensors, do go back: kept, they would lie in pieces.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 8 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)


def resident_bytes() -> int:
    """What the process has in memory now; its peak so far where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
