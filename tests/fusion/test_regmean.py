"""RegMean and RegMean++ against the equation, and their laws."""

import pytest
import torch
from tests.fusion.whole_tensors import NAMES, average, changed, fitted, models, network, task, tasks, weights
from torch import nn

from eutectic.bench.backbones import MeanPooled
from eutectic.bench.zoo import open_suite
from eutectic.checkpoint.base import Memory
from eutectic.errors import NonFiniteError, ParameterError, TaskError
from eutectic.fusion import _api, _folder
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._grams import LeastSquares
from eutectic.merge.api import state_dict
from eutectic.merge.view import Merged
from eutectic.task import Arrays, Task

BOTH = pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
LINEAR = ["first", "layer.0.up", "layer.0.gate", "layer.0.down", "layer.1.up", "layer.1.gate", "layer.1.down"]
LINEAR += ["layer.2.gate", "layer.2.down", "last"]  # layer.2.up is layer.0.up


def grams(module, of, shrink, wanted, tied):
    """Layer → E x xᵀ over all tokens, entry by entry; with ``tied`` layer.2.up's tokens count as layer.0.up's too."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).extend(x[0].reshape(-1, x[0].shape[-1]))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for x in of.splits["adapt"].inputs:
            module(x[None])
    for handle in handles:
        handle.remove()
    if tied:
        seen["layer.0.up"] += seen["layer.2.up"]
    found = {}
    for name in wanted:
        tokens, width = seen[name], len(seen[name][0])
        found[name] = torch.zeros(width, width, dtype=torch.float64)
        for i in range(width):
            for j in range(width):
                share = 1.0 if i == j else shrink
                found[name][i, j] = share * sum(x[i].item() * x[j].item() for x in tokens) / len(tokens)
    return found


def solved(experts, grams_K, name):
    """(Σ Wₖ Gₖ) (Σ Gₖ)⁻¹"""
    left = sum(expert[f"{name}.weight"] @ gram[name] for expert, gram in zip(experts, grams_K, strict=True))
    return left @ torch.linalg.inv(sum(gram[name] for gram in grams_K))


def filled(*parts):
    """The tiny network with tensors of several dicts, the later ones first."""
    module, state = network(), {}
    for part in parts:
        state |= part
    for name, tensor in module.state_dict().items():
        tensor.copy_(state[name])
    return module


def under(expert, *prefixes):
    return {name: tensor for name, tensor in expert.items() if name.startswith(prefixes)}


def naive_regmean(experts, of, shrink):
    grams_K = [grams(filled(expert), one, shrink, LINEAR, True) for expert, one in zip(experts.values(), of, strict=True)]
    return {f"{name}.weight": solved(experts.values(), grams_K, name) for name in LINEAR}


def naive_plusplus(experts, of, shrink):
    """One block after the other, in the order of the forward pass."""
    merged, found = average(experts), {}
    for prefix in ("first.", "layer.0.", "layer.1.", "layer.2.", "last."):
        candidates = [under(expert, prefix) for expert in experts.values()]
        for candidate in candidates:
            if prefix == "layer.2.":  # merged with block 0, to which it belongs
                del candidate["layer.2.up.weight"]
            if prefix == "layer.0.":
                candidate["layer.2.up.weight"] = candidate["layer.0.up.weight"]
        names = [name for name in LINEAR if f"{name}.".startswith(prefix)]
        grams_K = [grams(filled(merged, mine), one, shrink, names, False) for mine, one in zip(candidates, of, strict=True)]
        for name in names:
            found[f"{name}.weight"] = merged[f"{name}.weight"] = solved(experts.values(), grams_K, name)
        merged["layer.2.up.weight"] = merged["layer.0.up.weight"]
    return found


@pytest.mark.parametrize(
    ("method", "naive", "shrink"),
    [("regmean", naive_regmean, 1.0), ("regmean", naive_regmean, 0.9), ("regmean_plusplus", naive_plusplus, 0.9)],
)
def test_it_is_the_equation(method, naive, shrink):
    given, experts = models()
    result, _ = fitted(method, given, tasks(), shrink=shrink, batch_size=5)
    expected, mean = naive(experts, tasks(), shrink), average(experts)
    expected["layer.2.up.weight"] = expected["layer.0.up.weight"]
    for name, tensor in result.items():
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(tensor, expected.get(name, mean[name]), rtol=1e-7, atol=1e-9)
            assert name not in expected or not torch.allclose(tensor, mean[name], rtol=1e-3)
        else:
            assert torch.equal(tensor, given.base.read(name))


def test_each_has_inputs_of_its_own_kind():
    """They agree on the first layer, whose inputs are the data, and only there."""
    given, _ = models()
    one, other = (fitted(method, given, tasks())[0] for method in ("regmean", "regmean_plusplus"))
    torch.testing.assert_close(one["first.weight"], other["first.weight"])
    assert not torch.allclose(one["layer.1.up.weight"], other["layer.1.up.weight"], rtol=1e-4)


@BOTH
@pytest.mark.parametrize("shrink", [0.0, 0.9])
def test_equal_inputs_give_the_average_and_shrink_0_averages_columns_by_energy(method, shrink):
    given, experts = models()
    x = torch.randn(12, 4, 6, dtype=torch.float64)
    result, _ = fitted(method, given, tasks(features=x), shrink=shrink)
    torch.testing.assert_close(result["first.weight"], average(experts)["first.weight"], rtol=1e-12, atol=1e-14)
    louder = [task(name, features=x * gain) for name, gain in zip(NAMES, (1.0, 2.0, 3.0), strict=True)]
    result, _ = fitted(method, given, louder, shrink=shrink)
    expected = sum(gain**2 * expert["first.weight"] for gain, expert in zip((1, 2, 3), experts.values(), strict=True)) / 14
    torch.testing.assert_close(result["first.weight"], expected, rtol=1e-12, atol=1e-14)
    energy = [(of.splits["adapt"].inputs ** 2).mean((0, 1)) for of in tasks()]
    result, _ = fitted(method, given, tasks(), shrink=0.0)
    expected = sum(e * expert["first.weight"] for e, expert in zip(energy, experts.values(), strict=True)) / sum(energy)
    torch.testing.assert_close(result["first.weight"], expected, rtol=1e-12, atol=1e-14)


@BOTH
def test_one_expert_and_equal_experts_stay_as_they_are(method):
    given, experts = models()
    for names in (("a",), NAMES):
        result, _ = fitted(method, given._replace(experts={n: Memory(experts["a"]) for n in names}), tasks(names))
        for name, tensor in experts["a"].items():
            if tensor.dtype.is_floating_point:
                torch.testing.assert_close(result[name], tensor, rtol=1e-13, atol=1e-14)


@BOTH
def test_one_matrix_that_fits_all_inputs_is_found(method):
    """Each expert is right on the few directions of its own inputs, and wrong elsewhere; together they span all."""
    truth = torch.randn(3, 6, dtype=torch.float64)
    experts, of = {}, []
    for seed, name in enumerate(NAMES):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 3, generator=random, dtype=torch.float64) @ torch.randn(3, 6, generator=random, dtype=torch.float64)
        other = torch.linalg.svd(x).Vh[3:]
        wrong = torch.randn(3, 3, generator=random, dtype=torch.float64) @ other
        experts[name] = Memory({"weight": truth + wrong, "bias": torch.zeros(3, dtype=torch.float64)})
        of.append(task(name, features=x, width=3))
    given = ModelSet(nn.Linear(6, 3).double(), experts["a"], experts)
    result, _ = fitted(method, given, of, shrink=1.0)
    torch.testing.assert_close(result["weight"], truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dead", [False, True])
def test_the_solution_solves_the_normal_equations_and_keeps_what_nothing_tells(tokens, dead):
    random = torch.Generator().manual_seed(0)
    around, *weights_K = torch.randn(4, 5, 8, generator=random, dtype=torch.float64)
    sizes = 10.0 ** torch.arange(-4, 4, dtype=torch.float64)  # features of all sizes
    x_K = torch.randn(3, tokens // 3, 8, generator=random, dtype=torch.float64) * sizes
    if dead:
        x_K[..., 2] = 0
    problem = LeastSquares(around)
    for weight, x in zip(weights_K, x_K, strict=True):
        problem.add(weight, x.T @ x)
    found = problem.solution()
    left = sum((found - weight) @ x.T @ x for weight, x in zip(weights_K, x_K, strict=True)) / sizes
    scale = sum((weight.abs() @ x.abs().T @ x.abs()) for weight, x in zip(weights_K, x_K, strict=True)) / sizes
    assert (left.abs() <= 1e-10 * scale).all()
    assert torch.isfinite(found).all()
    if dead:
        torch.testing.assert_close(found[:, 2], around[:, 2], rtol=1e-9, atol=0)
    if tokens == 3:
        assert torch.linalg.matrix_rank((found - around) * sizes) <= 3


@BOTH
def test_gpt2_layers_are_merged_as_linear_ones_and_an_embedding_is_not(method):
    from transformers.pytorch_utils import Conv1D

    class Head(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(9, 6), layer, nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.inner(self.embed(ids)).tanh()).mean(1)

    def make(layer):
        torch.manual_seed(0)
        return Head(layer()).double()

    ids = {name: torch.randint(0, 9, (10, 4), generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
    of = [task(name, features=x, width=9) for name, x in ids.items()]
    given, experts = models(lambda: make(lambda: nn.Linear(6, 6)))
    turned, _ = models(lambda: make(lambda: Conv1D(6, 6)))
    for checkpoints in (given, turned):
        for name, expert in experts.items():
            flip = expert | {"inner.weight": expert["inner.weight"].T} if checkpoints is turned else expert
            checkpoints.experts[name] = Memory(flip)
    plain, artefact = fitted(method, given, of)
    conv, _ = fitted(method, turned, of)
    torch.testing.assert_close(conv["inner.weight"].T, plain["inner.weight"])
    assert list(artefact.tensors.specs) == ["tensors.inner.weight"]
    torch.testing.assert_close(plain["head.weight"], average(experts)["embed.weight"])


def test_layers_that_are_never_called_are_averaged():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.spare = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0].mean(1)

    def make():
        torch.manual_seed(0)
        return Partly().double()

    given, experts = models(make)
    for method in ("regmean", "regmean_plusplus"):
        result, artefact = fitted(method, given, tasks(width=6))
        assert not artefact.tensors.specs
        torch.testing.assert_close(result["spare.weight"], average(experts)["spare.weight"])


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plusplus"])
def test_a_network_whose_names_are_not_its_modules_paths_and_that_looks_at_its_data(method):
    from transformers import BertConfig, BertModel

    def make():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        return MeanPooled(BertModel(config)).eval()

    given, experts = models(make)
    ids = torch.randint(1, 30, (6, 7), generator=torch.Generator().manual_seed(0)) * (torch.arange(7) < 5)
    of = tasks(features=ids, width=8, dtype=torch.float32)
    result, artefact = fitted(method, given, of, samples=4)
    assert result.keys() == make().state_dict().keys()
    assert all(torch.isfinite(tensor).all() for tensor in result.values())
    dense = "encoder.layer.1.output.dense.weight"
    assert f"tensors.{dense}" in artefact.tensors.specs
    assert not torch.allclose(result[dense], average(experts)[dense], rtol=1e-3)
    if method != "fisher":
        assert len(artefact.tensors.specs) == 2 * 6 + 1  # and the pooler, which is called in vain


@BOTH
def test_dtypes_stay_and_the_artefact_outlives_the_fit(method, tmp_path):
    def half():
        return network(torch.bfloat16)

    _, experts = models(half)
    given = ModelSet(network(torch.float32), Memory(weights(half())), {n: Memory(e) for n, e in experts.items()})
    result, artefact = fitted(method, given, tasks(dtype=torch.float32))
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16, torch.int64}
    _api.save_artefact(artefact, tmp_path / "fit")
    again = state_dict(_api.fused(given.base, given.experts, _api.load_artefact(tmp_path / "fit")))
    assert all(torch.equal(again[name], tensor) for name, tensor in result.items())


@BOTH
def test_what_cannot_be_fitted_is_refused_by_name(method):
    given, _ = models()
    with pytest.raises(TaskError, match="'c' has no task"):
        fitted(method, given, tasks(("a", "b")))
    with pytest.raises(ParameterError, match="shrink"):
        fitted(method, given, tasks(), shrink=1.5)
    broken = changed(network, 2) | {"first.bias": torch.full((8,), float("inf"), dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match="'b'"):
        fitted(method, given._replace(experts=given.experts | {"b": Memory(broken)}), tasks())
    of = [*tasks(("a", "b")), task("c", features=torch.full((3, 4, 6), 1e200, dtype=torch.float64))]
    with pytest.raises(NonFiniteError, match="task 'c': the inputs of the layer"):
        fitted(method, given, of)


def three_of_mini():
    """Tasks that get in each other's way, and a function that scores weights on a hundred test samples of each."""
    suite, first = open_suite("mini"), torch.arange(100)
    of = []
    for name in ("letters", "openclipart", "indian_pines"):
        test = suite.arrays(name, "test")
        few = Arrays(test.inputs[first], test.labels[first], test.transform)
        of.append(Task(name, suite.task(name).head, adapt=suite.arrays(name, "adapt"), test=few))
    given = ModelSet(suite.backbone(), suite.base, suite.experts([one.name for one in of]))

    def score(found):
        _folder.filled(given.network, found)
        return sum(one.score(given.network).value for one in of) / len(of)

    return given, of, score


@BOTH
@pytest.mark.slow
def test_on_real_networks_it_beats_the_average(method):
    given, of, score = three_of_mini()
    artefact = _api.fit(method, given, of, {"samples": 24}, Run())
    merged = score(_api.fused(given.base, given.experts, artefact))
    assert merged > score(Merged("average", given.base, given.experts)) + 0.1
