"""Where mergekit 0.1.5 is wrong and we do not follow it, even under ``--compat mergekit``: both behaviours, by name.

Faults of older versions that this one no longer has are cases of ``test_mergekit_parity.py``: breadcrumbs that kept nothing
where γN < 1 (``breadcrumbs-few``, ``breadcrumbs-no-gamma``), an assertion at density 0 (``ties-nothing``).
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.parity.cases import CASES, WEIGHTS, halved
from tests.parity.compare import steps, worst
from tests.parity.faults import FAULTS
from tests.parity.models import DOWN, EMBED, NORM, WIDTH

from eutectic.errors import LayoutError, NonFiniteError, ParameterError, RecipeError
from eutectic.merge.mergekit import parse_mergekit

pytestmark = [pytest.mark.peer, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def zoo(peer):
    """A function that gives a model's tensors in float64."""

    def load(name, dtype="zoo"):
        return {key: tensor.double() for key, tensor in load_file(peer.root / dtype / name / "model.safetensors").items()}

    return load


@pytest.fixture(scope="module")
def vectors(zoo):
    """A function that gives the task vectors of models for one tensor."""

    def take(names, key):
        base = zoo("base")[key]
        return [zoo(name)[key] - base for name in names]

    return take


def close(found, wanted, rtol=1e-4, atol=1e-7):
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


def test_peer_fault_sce_weighs_near_models_alike(peer, ours, zoo, vectors):
    """Energies of 1 : 16 become 1 : 1 once the mean squares sum to less than 10⁻⁶, as after most fine-tuning."""
    first, second = vectors("st", DOWN)
    same = first * second > 0
    shares = {"theirs": (0.5, 0.5)}
    energy = [float(tau.square().sum()) for tau in (first, second)]
    shares["ours"] = (energy[0] / sum(energy), energy[1] / sum(energy))
    assert shares["ours"][0] < 0.1
    for found, (a, b) in ((peer.model("sce-near"), shares["theirs"]), (ours(FAULTS["sce-near"]), shares["ours"])):
        close((found[DOWN].double() - zoo("base")[DOWN])[same], (a * first + b * second)[same], rtol=1e-2, atol=1e-6)


def test_peer_fault_linear_of_weights_that_cancel_is_not_finite(peer, ours):
    assert not any(torch.isfinite(tensor).any() for tensor in peer.model("linear-zero").values())
    with pytest.raises(ParameterError, match="sum to zero"):
        ours(FAULTS["linear-zero"])


def test_peer_fault_integers_become_floats(peer, ours):
    theirs, found = peer.model("integers")[NORM], ours(FAULTS["integers"])[NORM]
    assert theirs.dtype == torch.bfloat16
    assert theirs[:4].tolist() == [1504, 1504, 1504, 1504]
    assert torch.equal(found, torch.arange(1500, 1500 + WIDTH))


def test_peer_fault_model_stock_walks_away_from_models_that_disagree(peer, ours, zoo, vectors):
    """t = K c / (1 + (K − 1) c) of a cosine near −1 is large and negative."""
    mean = sum(vectors("pq", DOWN)) / 2
    went = peer.model("model_stock-opposite")[DOWN].double() - zoo("base")[DOWN]
    t = float((went * mean).sum() / mean.square().sum())
    assert t < -5
    close(went, t * mean, atol=1e-5)
    assert torch.equal(ours(FAULTS["model_stock-opposite"])[DOWN].double(), zoo("base")[DOWN])


def test_peer_fault_model_stock_takes_near_models_for_orthogonal(peer, ours, zoo, vectors):
    """Products of norms below 10⁻⁶ are raised to it, so that a cosine of 0.8 is next to none."""
    first, second = vectors("uv", DOWN)
    mean = (first + second) / 2
    c = float((first * second).sum() / first.norm() / second.norm())
    assert c > 0.7
    share = {}
    for whose, found in (("theirs", peer.model("model_stock-near")), ("ours", ours(FAULTS["model_stock-near"]))):
        went = found[DOWN].double() - zoo("base")[DOWN]
        share[whose] = float((went * mean).sum() / mean.square().sum())
    assert abs(share["ours"] - 2 * c / (1 + c)) < 0.01
    assert share["theirs"] < 0.1


def test_peer_fault_arcee_fusion_writes_float32(peer, ours):
    """The config goes on to say bfloat16."""
    assert {tensor.dtype for tensor in peer.model("arcee_fusion-bfloat16").values()} == {torch.float32}
    config = json.loads((peer.folder("arcee_fusion-bfloat16") / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert {tensor.dtype for tensor in ours(FAULTS["arcee_fusion-bfloat16"]).values()} == {torch.bfloat16}


def chosen(found, base, expert):
    """Which entries are the expert's."""
    return (found.double() - expert).abs() < (found.double() - base).abs()


def important(base, expert):
    """The rule in float64: the importance of entries, and which are chosen."""
    log_p, log_q = expert.log_softmax(-1), base.log_softmax(-1)
    score = (expert - base).abs() * (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    ordered = score.flatten().sort().values
    q1, q2, q3 = (ordered[len(ordered) * i // 4] for i in (1, 2, 3))
    return score >= q2 + 1.5 * (q3 - q1)


def test_peer_fault_arcee_fusion_takes_rounding_for_importance(peer, ours, zoo):
    """Σ p log (p / q) in float32 cancels between near rows: what is chosen depends on the last bits."""
    base, expert = zoo("base"), zoo("t")
    wrong = {"ours": 0, "theirs": 0}
    for whose, found in (("theirs", peer.model("arcee_fusion-near")), ("ours", ours(FAULTS["arcee_fusion-near"]))):
        for key in (DOWN, EMBED):
            wrong[whose] += int((chosen(found[key], base[key], expert[key]) != important(base[key], expert[key])).sum())
    assert wrong["ours"] <= 4, "the quartiles may lie between two entries"
    assert wrong["theirs"] > 100


def test_peer_fault_arcee_fusion_samples_large_tensors(peer, ours, zoo):
    """Quartiles of more than 10⁶ entries are those of a random sample: two runs give two models."""
    first, second = peer.model("arcee_fusion-wide")[EMBED], peer.model("arcee_fusion-wide/again")[EMBED]
    assert int((first != second).sum()) > 0
    base, expert = zoo("wide-base")[EMBED], zoo("wide-f")[EMBED]
    found = ours(FAULTS["arcee_fusion-wide"])[EMBED]
    assert int((chosen(found, base, expert) != important(base, expert)).sum()) <= 4


@pytest.mark.parametrize("name", ["multislerp", "multislerp-base"])
def test_peer_fault_multislerp_never_leaves_the_mean_direction(name, peer, ours, zoo):
    """Its projection for the logarithm sums to 0, so the result is the normalised mean of the directions."""
    base, share = zoo("base")[DOWN], [weight / sum(WEIGHTS) for weight in WEIGHTS]
    origin = base if name.endswith("base") else torch.zeros_like(base)
    vectors = [zoo(expert)[DOWN] - origin for expert in "abc"]
    norm = sum(w * x.norm() for w, x in zip(share, vectors, strict=True))
    units = [x / x.norm() for x in vectors]
    mean = sum(w * u for w, u in zip(share, units, strict=True))
    mean = mean / mean.norm()
    close(peer.model(name)[DOWN], origin + norm * mean, atol=1e-6)
    step = torch.zeros_like(base)
    for w, u in zip(share, units, strict=True):
        angle = torch.arccos((u * mean).sum())
        step += w * angle / angle.sin() * (u - angle.cos() * mean)
    wanted = origin + norm * (step.norm().cos() * mean + step.norm().sin() * step / step.norm())
    found = ours(FAULTS[name])[DOWN]
    close(found, wanted, atol=1e-6)
    assert float(steps(found, peer.model(name)[DOWN]).max()) > 1


@pytest.mark.parametrize("name", ["karcher", "task_arithmetic-mean", "nuslerp-base", "model_stock"])
def test_peer_fault_bfloat16_is_computed_in_bfloat16(name, peer, ours):
    """Against its own float32: with ``dtype: bfloat16`` it is several steps off, where ours is as good as rounding allows."""
    exact = peer.model(f"{name}/half")
    assert worst(ours(halved(CASES[name])), exact)[0] <= 1
    assert worst(peer.model(f"{name}/bfloat16"), exact)[0] > 1


def test_peer_fault_a_nan_is_handed_on(peer, ours):
    assert int(peer.model("nan")[DOWN].isnan().sum()) == 1
    with pytest.raises(NonFiniteError, match=DOWN):
        ours(FAULTS["nan"])


def test_peer_fault_misspelt_keys_are_passed_over(peer, ours, zoo):
    """We refuse them, and under compat say so."""
    theirs = peer.model("misspelt")[DOWN]
    close(theirs, zoo("a")[DOWN])
    assert theirs.dtype == torch.float32
    with pytest.raises(RecipeError, match="dtyp"):
        parse_mergekit(FAULTS["misspelt"], "recipe.yaml")
    with parse_mergekit(FAULTS["misspelt"], "recipe.yaml", compat=True).open(peer.root) as merged:
        assert {word for word in ("wieght", "dtyp") if any(word in note for note in merged.notes)} == {"wieght", "dtyp"}
        close(merged.read(DOWN), zoo("a")[DOWN])


def test_peer_fault_equal_magnitudes_are_chosen_by_place(peer, ours, zoo):
    """Of entries that tie at the threshold, as between models in bfloat16, it keeps some; we keep all."""
    base, expert = zoo("base", "half")[DOWN], zoo("a", "half")[DOWN]
    delta = (expert - base).abs()
    count = delta.numel() // 2
    threshold = delta.flatten().sort(descending=True).values[count - 1]
    theirs, found = (model[DOWN].double() != base for model in (peer.model("ties-equal"), ours(FAULTS["ties-equal"])))
    assert torch.equal(found, delta >= threshold)
    assert int(theirs.sum()) == count < int(found.sum())
    assert torch.equal(theirs | (delta == threshold), found)
    tied = theirs[delta == threshold]
    assert tied.any()
    assert not tied.all()


def test_both_refuse_what_has_another_shape(peer, ours):
    assert "size mismatch" in peer.failed["odd"]
    with pytest.raises(LayoutError, match="does not fit"):
        ours(FAULTS["odd"])
