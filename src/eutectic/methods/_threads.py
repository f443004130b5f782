"""One torch thread where more would compete with our own, or change bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's operations, called from this thread, to one thread.

    Chunks are spread over our own threads, so torch's inside them would only compete; and linear algebra rounds in another
    order for each number of threads.  The number belongs to the calling thread (OpenMP's), and threads made meanwhile
    begin with it, so each thread that needs it says so itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
