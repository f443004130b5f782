"""Adapters fused into an adapter: against float64 formulas on dense changes, and laws that every space keeps."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from tests.merge.conftest import write_model

import eutectic
from eutectic import registry
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.peft import open_adapter
from eutectic.errors import EutecticError
from eutectic.merge.adapters import Fused
from eutectic.merge.run import save, verify
from eutectic.merge.view import Merged
from eutectic.methods._method import build

SHAPES = {"layers.0.q": (20, 12), "layers.0.v": (8, 12), "layers.1.q": (20, 12)}
BASE = {f"{module}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(9)) for module, shape in SHAPES.items()}


def factors(seed, rank=3, modules=tuple(SHAPES), dtype=torch.float32):
    """B and A by module."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        out, inputs = SHAPES[module]
        made[module] = torch.randn(out, rank, generator=random), torch.randn(rank, inputs, generator=random) / 4
    return {module: (B.to(dtype), A.to(dtype)) for module, (B, A) in made.items()}


@pytest.fixture
def write(tmp_path):
    """A function that writes a PEFT folder of factors, of their rank; alpha is 2 r, so that s = 2."""

    def folder(name, made, tensors=(), **config):
        path = tmp_path / name
        path.mkdir()
        stored = dict(tensors)
        for module, (B, A) in made.items():
            stored[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
            stored[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        safetensors.torch.save_file(stored, path / "adapter_model.safetensors")
        rank = next((B.shape[1] for B, _ in made.values()), 1)
        said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "org/base", **config}
        (path / "adapter_config.json").write_text(json.dumps(said))
        return path

    return folder


@pytest.fixture
def three(write):
    """Adapters of different ranks, alphas and targets."""
    return {
        "a": write("a", factors(1, 3)),
        "b": write("b", factors(2, 2, ["layers.0.q", "layers.0.v"]), lora_alpha=3),
        "c": write("c", factors(3, 4), use_rslora=True),
    }


#: the sums of the ranks, or the smaller side
RANKS = {"layers.0.q": 9, "layers.0.v": 8, "layers.1.q": 7}
SCALES = {"a": 2.0, "b": 3 / 2, "c": 8 / 2}


def opened(folders):
    return {name: open_adapter(folder) for name, folder in folders.items()}


def change(folder, scale, module):
    """ΔW in float64, zero where there is no such target."""
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    B, A = (stored.get(f"base_model.model.{module}.lora_{kind}.weight") for kind in "BA")
    return torch.zeros(SHAPES[module]).double() if B is None else scale * B.double() @ A.double()


def changes(folders):
    return {module: torch.stack([change(f, SCALES[n], module) for n, f in folders.items()]) for module in SHAPES}


def product(fused, module):
    B, A = (fused.read(f"base_model.model.{module}.lora_{kind}.weight").double() for kind in "BA")
    return B @ A


def near(found, wanted, tolerance=2e-6):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


# ── exactness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("space", ["core", "knots", "concat"])
@pytest.mark.parametrize(
    ("method", "parameters", "weights"),
    [
        ("average", {}, [1 / 3] * 3),
        ("average", {"weights": [1.0, 2.0, -1.0]}, [0.5, 1.0, -0.5]),
        ("task_arithmetic", {"scale": 0.3}, [0.3] * 3),
    ],
)
def test_linear_methods_are_the_sum_of_the_dense_changes(space, method, parameters, weights, three):
    fused = Fused(method, opened(three), parameters, space=space)
    for module, x_K in changes(three).items():
        wanted = torch.einsum("k,kmn->mn", torch.tensor(weights).double(), x_K)
        near(product(fused, module), wanted)
    assert {module: fused.rank_of(f"{module}.weight") for module in SHAPES} == RANKS


@pytest.mark.parametrize("space", ["core", "knots"])
def test_ties_is_ties_of_the_coordinates(space, three):
    """The oracle: dense singular vectors in float64, the method on them, and back."""
    fused = Fused("ties", opened(three), {"density": 0.4, "scale": 1.2, "over": "tensor"}, space=space)
    for module, x_K in changes(three).items():
        U, s, _ = torch.linalg.svd(torch.cat([*x_K], 1), full_matrices=False)
        U = U[:, s > 1e-10 * s[0]]
        _, s, Vh = torch.linalg.svd(torch.cat([*x_K]), full_matrices=False)
        V = Vh[s > 1e-10 * s[0]].T if space == "core" else torch.eye(SHAPES[module][1]).double()
        coordinates = U.T @ x_K @ V
        near(product(fused, module), U @ ties(coordinates, 0.4, 1.2) @ V.T, 1e-5)


def ties(x_K, density, scale):
    """Yadav et al., 2023, entry by entry."""
    kept = []
    for x in x_K:
        count = round(density * x.numel())
        least = x.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(x.abs() >= least, x, 0))
    kept_K = torch.stack(kept)
    sign = kept_K.sum(0).sign()
    agreeing = torch.where(kept_K.sign() == sign, kept_K, 0)
    return scale * agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


ON_CHANGES = [name for name in registry.names("methods") if build(name, {}).space == "delta" or name == "average"]


@pytest.mark.parametrize("method", ON_CHANGES)
def test_every_method_on_task_vectors_fuses_adapters(method, three):
    least, most = build(method, {}).experts
    count = most or max(3, least)
    fused = Fused(method, opened(dict(list(three.items())[:count])))
    for key in fused.specs:
        assert torch.isfinite(fused.read(key)).all()
    assert any(product(fused, module).norm() > 0 for module in SHAPES)


@pytest.mark.parametrize("space", ["core", "knots", "concat"])
def test_one_adapter_comes_back(space, three):
    fused = Fused("average", opened({"a": three["a"]}), space=space)
    for module in SHAPES:
        near(product(fused, module), change(three["a"], 2.0, module))
        assert fused.rank_of(f"{module}.weight") == 3


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", ["ties", "dare", "tsv_m", "pcb"])
def test_how_a_change_is_split_into_factors_does_not_matter(space, method, write):
    made = [factors(seed, dtype=torch.float64) for seed in (1, 2)]
    random = torch.Generator().manual_seed(5)
    split = []
    for of_expert in made:
        G = torch.randn(3, 3, generator=random).double() + 2 * torch.eye(3).double()
        split.append({module: (B @ G, torch.linalg.inv(G) @ A) for module, (B, A) in of_expert.items()})
    first, second = (
        Fused(method, opened({str(i): write(f"{label}{i}", f) for i, f in enumerate(experts)}), space=space)
        for label, experts in (("straight", made), ("turned", split))
    )
    for module in SHAPES:
        # the factors are read in float32, after which the two are as far apart as that
        near(product(first, module), product(second, module), 1e-4)


def test_a_shared_A_costs_no_rank(write):
    """As with adapters whose A is frozen."""
    made = [factors(seed) for seed in (1, 2, 3)]
    shared = [{module: (B, made[0][module][1]) for module, (B, _) in of_expert.items()} for of_expert in made]
    fused = Fused("ties", opened({str(i): write(str(i), f) for i, f in enumerate(shared)}))
    assert {fused.rank_of(name) for name in fused.targets} == {3}


def test_a_rank_is_the_best_approximation_and_says_what_it_cost(three):
    whole, cut = (Fused("average", opened(three), rank=rank) for rank in (None, 2))
    lost = total = 0.0
    for module in SHAPES:
        dense = product(whole, module)
        s = torch.linalg.svdvals(dense)
        lost, total = lost + float(s[2:].square().sum()), total + float(s.square().sum())
        assert float((product(cut, module) - dense).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-5)
        assert cut.specs[f"base_model.model.{module}.lora_A.weight"].shape[0] == 2
    assert cut.error == pytest.approx(math.sqrt(lost / total), rel=1e-5)
    assert whole.error == 0


def test_overrides_are_for_targets(three):
    from eutectic.merge.view import Override

    fused = Fused("task_arithmetic", opened(three), {"scale": 1.0}, [Override("layers.1.*", {"scale": 0.0})])
    assert product(fused, "layers.1.q").norm() == 0
    assert product(fused, "layers.0.q").norm() > 0


def test_factor_wise_averaging_differs_by_the_cross_terms(write):
    """Why factors are never averaged: (B₁ + B₂)(A₁ + A₂) / 4 has the products of one's B and the other's A."""
    made = [factors(seed) for seed in (1, 2)]
    fused = Fused("average", opened({str(i): write(str(i), f) for i, f in enumerate(made)}))
    for module in SHAPES:
        (B1, A1), (B2, A2) = ((B.double(), A.double()) for B, A in (of_expert[module] for of_expert in made))
        by_factor = 2 * (B1 + B2) / 2 @ (A1 + A2) / 2
        # Σ BᵢAᵢ / 2 − (B₁ + B₂)(A₁ + A₂) / 4 = (B₁ − B₂)(A₁ − A₂) / 4
        near(product(fused, module) - by_factor, 2 * (B1 - B2) @ (A1 - A2) / 4, 1e-5)


# ── tensors that are replaced as a whole ──────────────────────────────────────────────────────────────────────────────


def test_whole_tensors_are_merged_over_the_base(write):
    base = Memory({**BASE, "head.weight": torch.ones(2, 3)}, "base")
    key = "base_model.model.head.weight"
    folders = {"a": write("a", factors(1), {key: torch.full((2, 3), 3.0)}), "b": write("b", factors(2))}
    with pytest.raises(EutecticError, match="'a' replaces 'head.weight' as a whole.*name the `base`"):
        Fused("average", opened(folders))
    fused = Fused("task_arithmetic", opened(folders), {"scale": 0.5}, base=base)
    torch.testing.assert_close(fused.read(key), torch.full((2, 3), 2.0))
    near(product(fused, "layers.0.v"), 0.5 * sum(change(folder, 2.0, "layers.0.v") for folder in folders.values()))


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["slerp", "linear", "karcher", "arcee_fusion"])
def test_methods_on_whole_weights_are_refused(method, three):
    with pytest.raises(EutecticError, match=f"{method} needs the models' whole weights"):
        Fused(method, opened({"a": three["a"], "b": three["b"]}))


def test_bad_input_is_refused_by_name(three, write):
    with pytest.raises(EutecticError, match="ties is no weighted sum.*average and task_arithmetic"):
        Fused("ties", opened(three), space="concat")
    with pytest.raises(EutecticError, match="space = 'cor'. Did you mean 'core'"):
        Fused("ties", opened(three), space="cor")
    with pytest.raises(EutecticError, match="rank = 0"):
        Fused("ties", opened(three), rank=0)
    nan = factors(4)
    nan["layers.0.v"][1][0, 0] = torch.nan
    with pytest.raises(EutecticError, match="'n'.*holds a NaN or Inf in a factor of 'layers.0.v.weight'"):
        Fused("ties", opened({"a": three["a"], "n": write("n", nan)}))
    other = {"layers.0.q": (torch.ones(20, 2), torch.ones(2, 11))}
    with pytest.raises(
        EutecticError, match="'o'.*'layers.0.q.weight' with 20 outputs and 11 inputs, 'a'.*no adapters of one base"
    ):
        Fused("ties", opened({"a": three["a"], "o": write("o", other)}))
    turned = write("t", factors(2), fan_in_fan_out=True)
    with pytest.raises(EutecticError, match="'t'.*inputs, transposed, 'a' has it with 20 outputs and 12 inputs:"):
        Fused("ties", opened({"a": three["a"], "t": turned}))
    whole = write("w", factors(2, modules=["layers.0.v"]), {"base_model.model.layers.0.q.weight": torch.ones(20, 12)})
    with pytest.raises(EutecticError, match="'w' replaces 'layers.0.q.weight' as a whole, and 'a' has LoRA factors of it"):
        Fused("ties", opened({"a": three["a"], "w": whole}), base=Memory(BASE, "base"))
    dora = {"base_model.model.layers.0.q.lora_magnitude_vector": torch.ones(20)}
    with pytest.raises(EutecticError, match="'d'.*is DoRA.*dense model"):
        Fused("ties", opened({"d": write("d", factors(1, modules=["layers.0.q"]), dora, use_dora=True)}))
    with pytest.raises(EutecticError, match="no adapter was given that has LoRA factors"):
        Fused("ties", opened({"e": write("e", {}, {"base_model.model.x": torch.ones(1)})}))
    with pytest.raises(EutecticError, match="adapts 'layers.0.v.weight', which base lacks"):
        Fused("ties", opened(three), base=Memory({"layers.0.q.weight": BASE["layers.0.q.weight"]}, "base"))
    quantised = Memory({name: tensor.to(torch.uint8) for name, tensor in BASE.items()}, "base")
    with pytest.raises(EutecticError, match="base: 'layers.0.q.weight'.*is quantised.*without a base"):
        open_lora(three["a"], quantised)


# ── by a recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────

RECIPE = "method: ties\nexperts: {a: a, b: b, c: c}\nparameters: {density: 0.5}\noutput: adapter\n"


def test_a_recipe_gives_a_peft_folder(three, run, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + "rank: 5\n")
    status, out, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert status == 0, err
    assert "ties of 3 expert(s); rank 5, which leaves out" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (5, 5, "org/base")
    assert config["target_modules"] == sorted(SHAPES)
    base = Memory(BASE, "base")
    found = open_lora(tmp_path / "out", base)
    wanted = Fused("ties", opened(three), {"density": 0.5}, rank=5)
    for module in SHAPES:
        near(found.read(f"{module}.weight") - BASE[f"{module}.weight"], product(wanted, module), 1e-5)
    about = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    for name in wanted.specs:
        wanted.read(name)
    assert about["truncation_error"] == pytest.approx(wanted.error)
    assert about["inputs"].keys() == {"experts.a", "experts.b", "experts.c"}
    assert verify(tmp_path / "out") == []
    assert 'library_name: "peft"' in (tmp_path / "out" / "README.md").read_text()


def test_plan_knows_what_an_adapter_costs(three, run, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    status, out, err = run("plan", tmp_path / "r.yaml")
    assert status == 0, err
    assert "tensors         6" in out


def test_different_bases_get_a_note(three, write, run, tmp_path):
    write("d", factors(4), base_model_name_or_path="org/other")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("c: c", "d: d"))
    status, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert status == 0
    assert "note: the adapters name different bases (a: org/base, b: org/base, d: org/other)" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("space: kore\n", "5: space: Input should be 'core', 'knots' or 'concat'"),
        ("rank: 0\n", "5: rank: Input should be greater than or equal to 1"),
        ("chat_template: auto\n", "5: an adapter is merged from PEFT folders: leave out `chat_template`"),
        ("ranck: 3\n", "5: unknown key 'ranck'. Did you mean 'rank'?"),
    ],
)
def test_what_a_recipe_says_wrong_has_a_line(more, says, three, run, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + more)
    status, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert (status, says in err) == (2, True), err


def test_space_and_rank_are_of_adapters(three, run, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("output: adapter", "rank: 3"))
    status, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert (status, "4: `rank` is of an adapter: add `output: adapter`" in err) == (2, True), err


def test_without_it_the_model_is_dense(write, run, tmp_path):
    """PEFT folders over their base, merged as whole models, a chunk at a time."""
    write_model(tmp_path / "base", BASE)
    folders = [write(name, factors(seed), base_model_name_or_path="../base") for seed, name in ((1, "a"), (2, "b"))]
    (tmp_path / "r.yaml").write_text("method: ties\nbase: base\nexperts: [a, b]\n")
    assert run("merge", tmp_path / "r.yaml", tmp_path / "out")[0] == 0
    base = open_folder(tmp_path / "base")
    wanted = Merged("ties", base, {str(i): open_lora(folder, base) for i, folder in enumerate(folders)})
    found = open_folder(tmp_path / "out")
    for name in BASE:
        assert torch.equal(found.read(name), wanted.read(name))
        assert not torch.equal(found.read(name), BASE[name])


def test_a_recipes_base_is_that_of_adapters_whose_own_is_not_here(write, run, tmp_path):
    write_model(tmp_path / "base", BASE)
    folders = [write(name, factors(seed)) for seed, name in ((1, "a"), (2, "b"))]
    (tmp_path / "r.yaml").write_text("method: average\nbase: base\nexperts: [a, b]\n")
    assert run("merge", tmp_path / "r.yaml", tmp_path / "out")[0] == 0
    found = open_folder(tmp_path / "out").read("layers.0.v.weight").double()
    near(found - BASE["layers.0.v.weight"], sum(change(folder, 2.0, "layers.0.v") for folder in folders) / 2, 1e-5)


def test_from_python(three, tmp_path):
    fused = eutectic.merge_adapters("ties", three, density=0.5, rank=4, dtype=torch.bfloat16)
    eutectic.save(fused, tmp_path / "out")
    assert 0 < fused.error < 1
    assert {spec.dtype for spec in open_adapter(tmp_path / "out").file.specs.values()} == {torch.bfloat16}
    with pytest.raises(EutecticError, match="an adapter is merged as it is.*`repair`"):
        eutectic.save(fused, tmp_path / "again", repair=True)
    with pytest.raises(EutecticError, match="exists already"):
        eutectic.save(fused, tmp_path / "out")


def test_a_base_beside_the_adapters_is_named_as_seen_from_the_output(write, tmp_path):
    write_model(tmp_path / "base", BASE)
    folder = write("a", factors(1), base_model_name_or_path="../base")
    save(Fused("average", opened({"a": folder})), tmp_path / "deep" / "er" / "out")
    config = json.loads((tmp_path / "deep" / "er" / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../../base"
