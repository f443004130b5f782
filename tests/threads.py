"""A fixture for rooms whose tests are on small networks."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread():
    """Beside other work more of torch's threads than one are far slower there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
