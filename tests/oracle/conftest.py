"""One comparison for all oracles."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def assert_close():
    """Compare a merged model with an oracle's, to a few roundings of float32 at the size of the weights."""

    def check(found, wanted, tolerance=1e-6):
        assert list(found) == list(wanted)
        for name in wanted:
            size = max(1.0, float(wanted[name].abs().max()) if wanted[name].numel() else 0.0)
            torch.testing.assert_close(
                found[name].double(), wanted[name], rtol=0, atol=tolerance * size, msg=lambda m, name=name: f"{name}: {m}"
            )

    return check
