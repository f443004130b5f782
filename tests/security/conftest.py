"""One of torch's threads for these tests."""

from tests.threads import one_torch_thread as one_torch_thread
