"""Experts that are adapters: their task vectors stay thin, and give what the dense ones give."""

import copy
import re

import pytest
import torch
from tests.fusion.networks import base_of, inputs_of, network_of, tasks_of

import eutectic as eu
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.lora import Lora
from eutectic.checkpoint.peft import Adapter
from eutectic.errors import LayoutError, NonFiniteError
from eutectic.fusion import _components, _weighted
from eutectic.fusion._concrete import ConcreteMask
from eutectic.fusion._fit import Batches, backward, generator
from eutectic.fusion._fusion import ModelSet, Run
from eutectic.fusion._losses import entropy
from eutectic.fusion._mixing import MLP
from eutectic.fusion._routed import DenseExperts, FactoredExperts, MergedExperts
from eutectic.fusion._routing import gates
from eutectic.fusion._weighted import Dense, LowRank, Weighted
from eutectic.merge.api import state_dict

RUN = Run(seed=3)
#: linear layers of two of the kinds of networks, and whether their weights lie as GPT-2's do
LAYERS = {"vit": (r".*layers\.\d+\..*\.weight", False), "gpt2": (r".*\.h\.\d+\.(attn|mlp)\..*\.weight", True)}
NORMS = "norm|ln_"


def adapters_of(kind, base, ranks={"a": 2, "b": 1}, pattern=None):  # noqa: B006 - not changed
    """Adapters over a base: of all linear layers of its blocks, or of those whose weights are called like the pattern."""
    known, turned = LAYERS[kind]
    names = [name for name in base.specs if re.fullmatch(pattern or known, name) and not re.search(NORMS, name)]
    found = {}
    for number, (expert, rank) in enumerate(ranks.items()):
        random, tensors = torch.Generator().manual_seed(number), {}
        for name in names:
            m, n = base.spec(name).shape[:: -1 if turned else 1]
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n, generator=random)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(m, rank, generator=random)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": turned}
        found[expert] = Lora(base, Adapter(Memory(tensors, f"<{expert}>"), config))
    return found


def dense(experts):
    return {name: Memory(state_dict(expert), f"<dense {name}>") for name, expert in experts.items()}


@pytest.mark.parametrize("chunk", [1 << 17, 50])
@pytest.mark.parametrize("storage", [torch.bfloat16, None])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_equation_over_factors_is_the_one_over_dense_task_vectors(kind, storage, chunk, monkeypatch):
    monkeypatch.setattr(_weighted, "CHUNK", chunk)
    found = []
    for of in (lambda experts: experts, dense):
        network, width = network_of(kind)
        base = base_of(network)
        batches = Batches(RUN, tasks_of(kind, width), 4)
        equation = Weighted(network, base, of(adapters_of(kind, base)), storage)
        weights = torch.randn(equation.shape, generator=generator("weights"), dtype=torch.float64)
        mask = ConcreteMask(equation, 0.5, 0)
        for masks in (None, mask.sample("draw")):
            equation.write(weights, masks)
            loss = backward(network, batches, 0, entropy, RUN)
            state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            found.append((state, loss, equation.weight_gradient(masks)))
        found[-1] += (mask.gradient(weights, mask.sample("draw")),)
        vectors = {type(site.vectors) for site in equation.sites}
        assert vectors == ({Dense} if of is dense else {LowRank})
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-6)


def test_factors_are_taken_only_where_every_expert_has_some_over_this_base_and_they_are_smaller():
    network, _ = network_of("vit")
    base = base_of(network)
    thin = adapters_of("vit", base)

    def kinds(experts, base=base):
        return {type(site.vectors) for site in Weighted(copy.deepcopy(network), base, experts).sites}

    assert kinds(thin) == {LowRank}
    assert kinds({"a": thin["a"], "b": base}) == {Dense}  # a plain checkpoint does not say that it is thin
    assert kinds(adapters_of("vit", base, {"a": 16, "b": 16})) == {Dense}
    moved = Memory({name: tensor + 1 for name, tensor in state_dict(base).items()})
    assert kinds(thin, moved) == {Dense}


def test_a_layer_that_no_adapter_changes_is_no_site():
    network, _ = network_of("vit")
    base = base_of(network)
    equation = Weighted(network, base, adapters_of("vit", base, pattern=r".*\.q_proj\.weight"))
    assert len(equation.sites) == 2
    assert all(".q_proj." in site.name for site in equation.sites)


@pytest.mark.parametrize("method", ["adamerging", "adarank", "concrete_adamerging", "pwe_moe"])
def test_fits_over_adapters_are_those_over_dense_experts_within_rounding(method):
    parameters = {"steps": 3, "lr": 0.05} | ({"mask_steps": 2} if method == "concrete_adamerging" else {})
    network, width = network_of("vit", torch.float32)
    tasks, x = tasks_of("vit", width, dtype=torch.float32), inputs_of("vit", 4, dtype=torch.float32)
    experts = adapters_of("vit", base_of(network))
    thin, whole = (eu.fuse(method, network, given, tasks=tasks, seed=1, **parameters)(x) for given in (experts, dense(experts)))
    torch.testing.assert_close(thin, whole, rtol=1e-3, atol=1e-4)


def test_adarank_of_adapters_decomposes_no_dense_matrix(monkeypatch):
    network, width = network_of("vit")
    experts = adapters_of("vit", base_of(network))

    def refuse(*_):
        raise AssertionError("decomposed a dense matrix")

    monkeypatch.setattr(_components, "svd", refuse)
    eu.fuse("adarank", network, experts, tasks=tasks_of("vit", width), steps=1)


@pytest.mark.parametrize("kind", LAYERS)
def test_wemoe_of_adapters_keeps_factors_and_predicts_as_with_whole_matrices(kind, tmp_path):
    network, width = network_of(kind)
    tasks, x = tasks_of(kind, width, n=12), inputs_of(kind, 3)
    experts = adapters_of(kind, base_of(network))
    mixtures = [eu.fuse("wemoe", network, given, tasks=tasks, steps=1, batch_size=2) for given in (experts, dense(experts))]
    layers = [{type(m) for m in mixture.modules() if isinstance(m, MergedExperts)} for mixture in mixtures]
    assert layers == [{FactoredExperts}, {DenseExperts}]
    torch.testing.assert_close(mixtures[0](x), mixtures[1](x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for mixture in mixtures:  # far from where routers begin
            for number, gate in enumerate(gates(mixture).values()):
                for parameter in gate.router.parameters():
                    parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    torch.testing.assert_close(mixtures[0](x), mixtures[1](x), rtol=1e-5, atol=1e-5)
    numbers = [sum(p.numel() for p in mixture.parameters()) for mixture in mixtures]
    assert numbers[0] < numbers[1]
    eu.save(mixtures[0], tmp_path / "out")
    assert torch.equal(eu.load(tmp_path / "out", copy.deepcopy(network))(x), mixtures[0](x))


def test_wemoe_of_adapters_that_leave_the_mlps_alone_has_nothing_to_route():
    network, width = network_of("vit")
    experts = adapters_of("vit", base_of(network), pattern=r".*\.q_proj\.weight")
    with pytest.raises(LayoutError, match="nothing to route"):
        eu.fuse("wemoe", network, experts, tasks=tasks_of("vit", width), steps=1)


def test_an_mlp_layer_that_no_adapter_changes_costs_nothing():
    network, width = network_of("vit")
    base = base_of(network)
    first = next(name for name in base.specs if re.fullmatch(MLP, name.removesuffix(".weight")))
    experts = adapters_of("vit", base, pattern=re.escape(first))
    mixture = eu.fuse("wemoe", network, experts, tasks=tasks_of("vit", width), steps=1, batch_size=2)
    ranks = [layer.right.shape[1] for layer in mixture.modules() if isinstance(layer, FactoredExperts)]
    assert ranks == [2, 0, 0, 0]


@pytest.mark.parametrize("method", ["adamerging", "wemoe"])
def test_a_factor_that_is_no_number_is_named(method):
    network, width = network_of("vit")
    base = base_of(network)
    experts = adapters_of("vit", base)
    experts["b"]._adapter.file._tensors["base_model.model.model.layers.0.mlp.fc2.lora_A.weight"][0, 0] = torch.nan
    models = ModelSet(network, base, experts)
    with pytest.raises(NonFiniteError, match=r"expert 'b' .*NaN or Inf in 'model.layers.0.mlp.fc2.weight'"):
        eu.fuse(method, models.network, models.experts, tasks=tasks_of("vit", width), steps=1)
