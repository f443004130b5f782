"""Products with a matrix for each sample, against the matrices themselves: compiled or not, dense or sparse, and gradients."""

import functools

import pytest
import torch
from torch.nn import functional as F

from eutectic.fusion import _products
from eutectic.fusion._products import packed, per_sample, sparse_per_sample, tiles

KINDS = pytest.mark.parametrize("kind", ["dense", "sparse"])
WAYS = pytest.mark.parametrize(
    "way",
    [
        pytest.param("compiled", marks=pytest.mark.skipif(_products.LIBRARY is None, reason="built without a compiler")),
        "arrays",
    ],
)


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    if "way" in request.fixturenames and request.getfixturevalue("way") == "arrays":
        monkeypatch.setattr(_products, "LIBRARY", None)
    monkeypatch.setattr(_products, "TILE", 400)  # several tiles even of small matrices


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B, T, m, n, N=3, dtype=torch.float32):
    x, c, weight, deltas = some(B, T, n), some(B, N, seed=1), some(m, n, seed=2), some(N, m, n, seed=3)
    deltas[0, : m // 2] = 0  # long gaps
    return [t.to(dtype) for t in (x, c, weight, deltas)]


def product_of(kind, deltas, density=0.2):
    """The function of x, c and W₀, and the experts that it has."""
    if kind == "dense":
        return lambda x, c, weight: per_sample(x, c, weight, deltas), deltas
    gaps, values, counts = packed(deltas, density)
    return lambda x, c, weight: sparse_per_sample(x, c, weight, gaps, values, counts), pruned(deltas, density)


def pruned(deltas, density):
    """As the paper has it, by torch's own quantile."""
    if density == 1:
        return deltas
    flat = deltas.abs().flatten(1).double()
    return deltas * (flat > flat.quantile(1 - density, dim=1, keepdim=True)).view_as(deltas)


def whole(x, c, weight, deltas):
    matrices = weight + torch.einsum("bi,imn->bmn", c, deltas)
    return torch.einsum("bmn,btn->btm", matrices, x)


@KINDS
@WAYS
@pytest.mark.parametrize(("T", "m", "n"), [(1, 30, 20), (2, 12, 16), (8, 25, 7), (9, 50, 40), (19, 13, 801)])
@pytest.mark.parametrize("B", [1, 3, 6])
def test_it_is_each_samples_own_matrix_with_its_gradients(kind, way, B, T, m, n):
    x, c, weight, deltas = inputs(B, T, m, n)
    product, deltas = product_of(kind, deltas)
    wide = [t.double().requires_grad_() for t in (x, c, weight)]
    G = some(B, T, m, seed=4)
    expected = whole(*wide, deltas.double())
    gradients = torch.autograd.grad(expected, wide, G.double())
    near = {"rtol": 1e-4, "atol": 1e-5 * n}
    torch.testing.assert_close(product(x, c, weight), expected.detach().float(), **near)
    ours = [t.clone().requires_grad_() for t in (x, c, weight)]
    found = product(*ours)
    torch.testing.assert_close(found.detach(), expected.detach().float(), **near)
    for one, other in zip(torch.autograd.grad(found, ours, G), gradients, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5 * m * n)


@KINDS
def test_other_dtypes_have_it_too_and_gradients_are_exact(kind):
    x, c, weight, deltas = inputs(2, 3, 25, 20, dtype=torch.float64)
    product, deltas = product_of(kind, deltas)
    torch.testing.assert_close(product(x, c, weight), whole(x, c, weight, deltas))
    assert torch.autograd.gradcheck(product, tuple(t.requires_grad_() for t in (x, c, weight)))
    half = [t.detach().bfloat16() for t in (x, c, weight, deltas)]
    product, deltas = product_of(kind, half[3])
    assert product(*half[:3]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert product_of(kind, deltas.float())[0](half[0], c.float(), weight.float()).dtype == torch.float32


@KINDS
@WAYS
def test_a_sample_does_not_depend_on_the_others(kind, way):
    x, c, weight, deltas = inputs(7, 5, 50, 40)
    product, _ = product_of(kind, deltas)
    together = product(x, c, weight)
    alone = torch.cat([product(x[b : b + 1], c[b : b + 1], weight) for b in range(7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


@KINDS
@WAYS
def test_inputs_need_not_be_contiguous_and_threads_change_nothing(kind, way):
    x, c, weight, deltas = inputs(5, 9, 50, 40)
    product, _ = product_of(kind, deltas)
    expected = product(x, c, weight)
    odd = [t.mT.contiguous().mT for t in (x, c, weight)]
    assert not any(t.is_contiguous() for t in odd)
    torch.testing.assert_close(product(*odd), expected, rtol=0, atol=1e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(product(x, c, weight), expected, rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@KINDS
@pytest.mark.parametrize("T", [1, 4])
def test_it_can_be_exported_for_any_number_of_samples(kind, T):
    x, c, weight, deltas = inputs(5, T, 50, 40)
    product, _ = product_of(kind, deltas)

    class Layer(torch.nn.Module):
        def forward(self, x, c):
            return product(x, c, weight)

    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(Layer(), (x, c), dynamic_shapes=({0: batch}, {0: batch}))
    assert all(node.namespace in ("aten", "prim") for node in ops(program))  # no code of ours is needed to run it
    torch.testing.assert_close(program.module()(x, c), product(x, c, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(program.module()(x[:3], c[:3]), product(x[:3], c[:3], weight), rtol=1e-4, atol=1e-4)


def ops(program):
    return [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@WAYS
def test_what_is_packed_is_what_the_paper_keeps(way, density):
    deltas = some(3, 50, 40)
    deltas[1, :49] = 0  # a gap of several tiles, and more than half of the entries are equal
    deltas[2] = 1
    gaps, values, counts = packed(deltas, density)
    assert gaps.dtype == torch.uint8
    assert len(gaps) == len(values) == sum(counts)
    assert len(counts) == len(tiles((50, 40))) > 1
    kept = pruned(deltas, density)
    least = int((kept != 0).sum())
    assert least <= len(values) <= least + 3 * 50 * 40 // 255
    eye = torch.eye(40).expand(3, 40, 40).contiguous()
    found = sparse_per_sample(eye, torch.eye(3), torch.zeros(50, 40), gaps, values, counts)
    assert torch.equal(found.mT, kept)
    if density == 0.1:
        assert int((kept[0] != 0).sum()) == 200
        assert not kept[2].any()  # strictly more than its quantile


def test_ties_and_an_expert_that_equals_the_base():
    deltas = torch.zeros(2, 24, 10)
    gaps, values, counts = packed(deltas, 0.1)
    x, c, weight = some(2, 3, 10), some(2, 2), some(24, 10)
    assert len(values) == 0
    torch.testing.assert_close(sparse_per_sample(x, c, weight, gaps, values, counts), F.linear(x, weight))


def test_a_gradient_keeps_no_matrices():
    x, c, weight, deltas = inputs(16, 4, 48, 40)
    c.requires_grad_()
    y = per_sample(x, c, weight, deltas)
    kept = y.grad_fn.saved_tensors
    assert sum(t.numel() for t in kept) == x.numel() + c.numel() + weight.numel()
    assert functools.reduce(max, (t.numel() for t in kept)) < 16 * weight.numel()


@pytest.mark.skipif(_products.LIBRARY is None, reason="built without a compiler")
def test_nothing_is_written_past_the_last_row_by_zeros_between_far_entries_or_by_counts_that_lie():
    n, N = 768, 2
    deltas, ones = torch.zeros(N, 1, n), torch.ones(N)
    deltas[0, 0, 0], deltas[1, 0, 5] = 1, 2  # between them are eleven rows that the only group has not
    gaps, values, counts = packed(deltas, 1.0)
    assert len(counts) == 1
    buffer = torch.full((20, n), -0.0)  # which adding 0 would change
    _products._Sparse([gaps], [values], N)._add(0, ones, 12 * n, buffer[:1])
    assert buffer[0, [0, 5]].tolist() == [1, 2]
    _products._Sparse([gaps.new_full((2000,), 255)], [torch.ones(2000)], N)._add(0, ones, 12 * n, buffer[:1])
    assert buffer[1:].signbit().all()
