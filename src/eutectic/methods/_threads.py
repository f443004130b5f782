"""One torch thread where more would compete with our own, or change bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_depth = 0
_before = 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread while anybody is inside; the last to leave restores what was.

    Chunks are spread over our own threads, so torch's inside them would only compete; and linear algebra rounds in another
    order for each number of threads.
    """
    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.set_num_threads(_before)
