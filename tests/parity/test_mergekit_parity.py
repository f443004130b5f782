"""Every method that mergekit shares, run by both on the same small models: under ``--compat mergekit`` within one bf16 step.

The sound comparison is ``dtype: float32``, with ``out_dtype: bfloat16`` for the rounding: with ``dtype: bfloat16`` mergekit
also computes in bfloat16, and its own rounding is several steps.  Where the two disagree because the peer is wrong, see
``test_mergekit_faults.py``; what is known to be wrong in no case here was compared and agrees.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.parity.cases import CASES, SAMPLED, bfloat16, halved, ranks
from tests.parity.compare import steps, worst
from tests.parity.models import EMBED
from tests.parity.shapes import SHAPES

from eutectic.merge.mergekit import parse_mergekit
from eutectic.merge.mergekit_methods import RULES

pytestmark = [pytest.mark.peer, pytest.mark.timeout(1800)]


def method_of(name):
    return name.partition("-")[0]


def test_every_method_is_compared():
    assert {method_of(name) for name in {**CASES, **SAMPLED}} | {"multislerp"} == set(RULES)  # multislerp: a fault


@pytest.mark.parametrize("name", CASES)
def test_float32(name, peer, ours, note):
    distance, where = worst(ours(CASES[name]), peer.model(name))
    note(method_of(name), "float32", distance)
    assert distance <= 1, where


@pytest.mark.parametrize("name", [name for name in CASES if not ranks(name)])
def test_models_in_bfloat16(name, peer, ours, note):
    """Computed in float32 by both; ours is the same, bit for bit, with ``dtype: bfloat16``."""
    found = ours(halved(CASES[name]))
    distance, where = worst(found, peer.model(f"{name}/half"))
    note(method_of(name), "bfloat16", distance)
    assert distance <= 1, where
    same = ours(bfloat16(CASES[name]))
    assert all(torch.equal(tensor, same[key]) for key, tensor in found.items())


# ── random methods ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def delta(peer):
    """The task vector of the expert that is sampled."""
    base, expert = (load_file(peer.root / "zoo" / name / "model.safetensors") for name in ("base", "a"))
    return {name: expert[name].double() - base[name].double() for name in base}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_laws_of_sampling(name, whose, peer, ours, delta):
    """Each entry is dropped, or kept times one factor a tensor; that restores the L1 norm, or is 1 without ``rescale``."""
    merged = ours(SAMPLED[name]) if whose == "ours" else peer.model(name)
    base = load_file(peer.root / "zoo/base/model.safetensors")
    density = float(SAMPLED[name].partition("density: ")[2].partition(",")[0].partition("}")[0])
    counts = []
    for key, tensor in delta.items():
        sure = tensor.abs() > 1e-4  # far above float32's rounding of the base
        ratio = (merged[key].double() - base[key].double())[sure] / tensor[sure]
        kept = ratio.abs() > 0.1
        wanted = 1.0 if "plain" in name else float(tensor[sure].abs().sum() / tensor[sure][kept].abs().sum())
        tolerance = 0.01 if "plain" in name else 0.03  # those that are not sure count in mergekit's sum
        assert ratio[kept].sub(wanted).abs().max() < tolerance * wanted, key
        assert not ratio[~kept].abs().gt(0.01).any(), key
        counts.append((int(kept.sum()), kept.numel()))
    share = sum(count for count, _ in counts) / sum(n for _, n in counts)
    assert abs(share - density) < 0.01, "five standard deviations"


@pytest.mark.parametrize("name", [name for name in SAMPLED if name.startswith("della")])
def test_della_keeps_large_entries_more_often(name, peer, ours, delta):
    """The kept shares by rank within the row, in eighths: ours and theirs climb from density − ε to density + ε alike."""
    base = load_file(peer.root / "zoo/base/model.safetensors")
    shares = []
    for merged in (ours(SAMPLED[name]), peer.model(name)):
        parts = []
        for key, tensor in delta.items():
            rows = tensor.reshape(-1, tensor.shape[-1])
            kept = ((merged[key].double() - base[key].double()).abs() > 1e-6).reshape(rows.shape)
            parts.append(kept.gather(1, rows.abs().argsort(1)).double().unflatten(1, (8, -1)).mean((0, 2)) * rows.shape[0])
        shares.append(torch.stack(parts).sum(0) / sum(tensor.numel() // tensor.shape[-1] for tensor in delta.values()))
    text = SAMPLED[name]
    density, epsilon = (
        float(text.partition(f"{key}: ")[2].partition(",")[0].partition("}")[0]) for key in ("density", "epsilon")
    )
    line = density + epsilon * (torch.arange(8, dtype=torch.float64) / 4 - 7 / 8)
    for found in shares:
        assert (found - line)[1:].abs().max() < 0.02  # the smallest eighth has entries too small to see
    assert (shares[0] - shares[1]).abs().max() < 0.02


# ── the shapes of recipes ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "shape-union"])
def test_recipes_of_all_shapes(name, peer, ours, note):
    distance, where = worst(ours(SHAPES[name]), peer.model(name))
    note("(shapes)", "bfloat16" if "out_dtype" in SHAPES[name] else "float32", distance)
    assert distance <= 1, where


def test_a_union_of_vocabularies(peer, ours, note):
    """Token by token: in which order it numbers those that are new, mergekit leaves to Python's hash seed, and we do not."""
    with parse_mergekit(SHAPES["shape-union"], compat=True).open(peer.root) as merged:
        tokens = dict(merged.tokenizer.vocabulary.tokens)
    written = json.loads((peer.folder("shape-union") / "tokenizer.json").read_text())
    numbers = written["model"]["vocab"] | {token["content"]: token["id"] for token in written["added_tokens"]}
    assert numbers.keys() == tokens.keys()
    found, theirs = ours(SHAPES["shape-union"]), peer.model("shape-union")
    for key in (EMBED, "lm_head.weight"):
        assert found[key].shape == theirs[key].shape
        # rows that no token has: mergekit's mean over the rows of the output's tokens, ours over those of the model's own
        assert float(steps(found[key][len(tokens) :], theirs[key][len(tokens) :]).max()) > 1
        found[key] = found[key][list(tokens.values())]
        theirs[key] = theirs[key][[numbers[token] for token in tokens]]
    distance, where = worst(found, theirs)
    note("(shapes)", "float32", distance)
    assert distance <= 1, where
