"""Parties combined: from folders by a recipe, in Python, calibrated, and scored."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tests.ensemble.parties import digits, parties, party
from typer.testing import CliRunner

import eutectic as eu
from eutectic import cli, errors, registry
from eutectic.ensemble import _calibration
from eutectic.ensemble._density import Flat
from eutectic.ensemble._ensemble import Ensemble, Outputs
from eutectic.ensemble._gaussians import GaussianMixture
from eutectic.ensemble._networks import MLP
from eutectic.ensemble._party import About, Party, write_party
from eutectic.ensemble._predictions import mixture
from eutectic.task import Task

FITTED = [name for name in registry.names("ensemble") if registry.get("ensemble", name)().fit]
FAST = {"density_reuse_joint": {"steps": 5}, "density_reuse_mpce": {"steps": 5}}


def examples(split="adapt", n=200):
    images, labels = digits(split)
    return images[:n], labels[:n]  # the classes are "digit 0" … "digit 9", so their order is that of the labels


def accuracy(ensemble):
    images, labels = digits("test")
    return eu.evaluate(ensemble, [Task("digits", torch.nn.Identity(), test=(images, labels))])[0].value


def npz(path, prefix="train", split="adapt", **changes):
    images, labels = digits(split)
    data = {
        f"{prefix}_images": (images.permute(0, 2, 3, 1) * 255).round().byte().numpy(),
        f"{prefix}_labels": labels.numpy(),
        "classes": np.array([f"digit {c}" for c in range(10)]),
    }
    np.savez(path, **data | changes)
    return path


@pytest.fixture
def workshop(tmp_path):
    for name, member in parties().items():
        write_party(member, tmp_path / name)

    def write(method="density_reuse", more="", name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(f"method: {method}\nexperts: {{one: one, two: two, three: three}}\n{more}")
        return path

    return write


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_densities_decide_better_than_certainty_does():
    found = {method: accuracy(eu.combine(method, parties())) for method in ("density_reuse", "mean_ensemble", "max_ensemble")}
    assert found["density_reuse"] > max(found["mean_ensemble"], found["max_ensemble"]) + 0.05
    assert found["density_reuse"] > 0.9


def test_from_party_folders_to_a_scored_folder(workshop, tmp_path):
    assert "3 parties over 10 classes" in run("fuse", workshop(), tmp_path / "out").output
    loaded = eu.load(tmp_path / "out")
    assert loaded.classes == tuple(f"digit {c}" for c in range(10))
    images, _ = digits("test")
    whole = eu.combine("density_reuse", parties())
    with torch.no_grad():
        assert torch.equal(loaded(images), whole(images))
        torch.testing.assert_close(loaded(images).logsumexp(1), torch.zeros(len(images)), atol=1e-5, rtol=0)
    data = npz(tmp_path / "digits.npz", "test", "test")
    said = json.loads(run("eval", tmp_path / "out", "--data", data, "--json").output)
    assert said["value"] == accuracy(whole)
    assert (said["method"], said["suite"], said["metric"]) == ("density_reuse", "digits", "accuracy")
    about = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert about["recipe"]["method"] == "density_reuse"
    assert {name: about["inputs"][name]["density"] for name in ("one", "two", "three")} == {
        name: member.fingerprints()["density"] for name, member in parties().items()
    }
    assert "Tang et al." in (tmp_path / "out" / "README.md").read_text()
    eu.save(loaded, tmp_path / "again")
    assert torch.equal(eu.load(tmp_path / "again")(images), loaded(images))


@pytest.mark.parametrize("method", FITTED)
def test_what_is_fitted_is_kept_and_repeats(workshop, tmp_path, method):
    npz(tmp_path / "shared.npz")
    given = "".join(f"  {key}: {value}\n" for key, value in FAST.get(method, {}).items())
    path = workshop(method, "examples: shared.npz\n" + (f"parameters:\n{given}" if given else ""))
    run("fuse", path, tmp_path / "out")
    images, _ = digits("test")
    fitted = eu.combine(method, parties(), examples(n=10**6), **FAST.get(method, {}))
    with torch.no_grad():
        torch.testing.assert_close(eu.load(tmp_path / "out")(images), fitted(images), atol=1e-4, rtol=1e-4)
        plain = eu.combine("density_reuse", parties())
        assert not torch.allclose(fitted(images), plain(images), atol=1e-4)
    assert accuracy(fitted) > accuracy(plain) - 0.03 or method == "weighted_ensemble"


def test_every_rule_is_there_and_says_what_it_needs():
    assert {"mean_ensemble", "weighted_ensemble", "max_ensemble", "density_reuse"} <= set(registry.names("ensemble"))
    for method in registry.names("ensemble"):
        if method in FITTED:
            with pytest.raises(errors.TaskError, match=f"{method} is fitted to labelled examples"):
                eu.combine(method, parties())
        else:
            with pytest.raises(errors.TaskError, match="learns nothing from labelled examples"):
                eu.combine(method, parties(), examples())


# ── exactness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Exact(torch.nn.Module):
    """Log p(x, y) of classes that are Gaussian, as logits."""

    def __init__(self, means, log_counts):
        super().__init__()
        self.means, self.log_counts = means, log_counts

    def forward(self, x):
        return self.log_counts - 0.5 * torch.cdist(x, self.means).square()


def _gaussian_party(means, counts):
    about = About(
        **{"classes": tuple(f"c{i}" for i in means), "counts": tuple(counts), "shape": (2,), "space": Flat()},
        classifier=MLP(),
        density=party("one").about.density,
    )
    places, log_counts = torch.tensor(list(means.values())), torch.tensor(counts).float().log()
    density = GaussianMixture(len(means), 2)
    with torch.no_grad():
        density.means.copy_(places)
        density.log_weights.copy_(log_counts)
    made = Party(about, about.network(), density)
    made.classifier.network = _Exact(places, log_counts)
    return made


def test_with_exact_models_it_is_the_bayes_classifier_of_all_data():
    centre = {0: [0.0, 0.0], 1: [1.0, 0.5], 2: [0.0, 2.0]}
    one = _gaussian_party({0: centre[0], 1: centre[1]}, (30, 10))
    two = _gaussian_party({1: centre[1], 2: centre[2]}, (20, 40))
    found = eu.combine("density_reuse", {"one": one, "two": two})
    x = 2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    pooled = _Exact(torch.tensor(list(centre.values())), torch.tensor([30.0, 30.0, 40.0]).log())(x)
    torch.testing.assert_close(found(x), pooled.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_a_party_of_one_class_has_its_say_by_its_density_alone():
    one, two = _gaussian_party({0: [0.0, 0.0]}, (30,)), _gaussian_party({1: [1.0, 0.5], 2: [0.0, 2.0]}, (30, 40))
    found = eu.combine("density_reuse", {"one": one, "two": two})
    x = 2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    pooled = _Exact(torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.0, 2.0]]), torch.tensor([30.0, 30.0, 40.0]).log())(x)
    torch.testing.assert_close(found(x), pooled.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_the_example_of_the_flu():
    """One hospital knows ⟨2, 4, 1, 0⟩ cases in seven, another ⟨0, 0, 1, 3⟩ in four: certainty says 4, likely cases 2."""
    log_p = torch.tensor([[[2, 4, 1, 0]], [[0, 0, 1, 3]]]).float()
    log_p = (log_p / log_p.sum(2, keepdim=True)).log()
    assert log_p.amax(0).argmax() == 3
    for weight, says in ((0.56, 3), (0.58, 1)):
        assert mixture(torch.tensor([weight, 1 - weight]).log(), log_p).argmax() == says


# ── calibration ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tempering_mends_densities_that_are_too_certain_and_leaves_good_ones():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])[:, None].expand(-1, 2000, -1)
    prior, ratio = torch.tensor([0.5, 0.5]).log(), torch.randn(2000, generator=generator)
    labels = (torch.rand(2000, generator=generator) < torch.sigmoid(ratio)).long()
    density = torch.stack([torch.zeros(2000), ratio])
    for factor in (1.0, 10.0):
        outputs = Outputs(log_p, prior[:, None] + factor * density)
        exponent, bias = _calibration.fit_tempering(outputs, labels, prior, strength=1.0)
        torch.testing.assert_close(exponent * factor, torch.tensor(1.0), atol=0.2, rtol=0)
        assert bias.abs().max() < 0.2
    few, _ = _calibration.fit_tempering(Outputs(log_p[:, :1], outputs.log_weights_KB[:, :1]), labels[:1], prior, 1e6)
    torch.testing.assert_close(few, torch.tensor(1.0), atol=1e-3, rtol=0)


def test_the_losses_are_their_equations():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(2, 6, 3, generator=generator).log_softmax(2)
    weights, labels = 5 * torch.randn(2, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    known = torch.tensor([[True, True, False], [False, True, True]])
    p, w = log_p.double().exp(), weights.double()
    at = [sum(w[k, b].exp() * p[k, b, labels[b]] for k in range(2)).log() for b in range(6)]
    joint = -torch.stack(at).mean()
    evidence = torch.stack([sum(w[k, b].exp() * p[k, b].sum() for k in range(2)).log() for b in range(6)]).mean()
    r = w - w.max(0).values
    published = -sum(r[k, b].exp() * p[k, b, labels[b]] + known[k, labels[b]] * r[k, b] for k in range(2) for b in range(6)) / 6
    outputs = Outputs(log_p, weights)
    for loss, oracle in (
        (_calibration.joint_loss, joint),
        (_calibration.posterior_loss, joint + evidence),
        (_calibration.published_loss, published),
    ):
        torch.testing.assert_close(loss(outputs, labels, known).double(), oracle, atol=1e-5, rtol=1e-5)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parties_that_do_not_fit_together_are_refused():
    plain, other = party("one"), party("two")
    bare = dataclasses.replace(other, about=other.about.model_copy(update={"density": None, "space": None}), density=None)
    with pytest.raises(errors.CheckpointError, match="party 'b' .* has no density model"):
        eu.combine("density_reuse", {"a": plain, "b": bare})
    eu.combine("mean_ensemble", {"a": plain, "b": bare})
    wide = dataclasses.replace(other, about=other.about.model_copy(update={"space": Flat()}))
    with pytest.raises(errors.CheckpointError, match="party 'b' .* log-densities compare in one space only"):
        eu.combine("density_reuse", {"a": plain, "b": wide})
    large = dataclasses.replace(other, about=other.about.model_copy(update={"shape": (1, 9, 9)}))
    with pytest.raises(errors.CheckpointError, match=r"party 'b' .* takes inputs \[1, 9, 9\]"):
        eu.combine("mean_ensemble", {"a": plain, "b": large})
    with pytest.raises(errors.TaskError, match=r"inputs are \[B, 1, 8, 8\], not \[2, 3\]"):
        eu.combine("mean_ensemble", {"a": plain})(torch.zeros(2, 3))
    with pytest.raises(errors.TaskError, match="no parties"):
        eu.combine("mean_ensemble", {})


def test_a_density_that_breaks_names_its_party():
    broken = party("two")
    with torch.no_grad():
        broken.density.means.fill_(torch.nan)
    with pytest.raises(errors.NonFiniteError, match="party 'b': its log-density of 3 of 3 samples is NaN"):
        eu.combine("density_reuse", {"a": party("one"), "b": broken})(digits("test")[0][:3])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": np.array([f"digit {c + 1}" for c in range(10)])}, "no party knows the class 'digit 10'. Did you mean"),
        ({"train_labels": np.array([0, 1])}, "need as many integers"),
        ({"classes": np.array(["digit 0"])}, "there are 1 classes"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "can be read: Object arrays cannot be loaded"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(workshop, tmp_path, changes, says):
    npz(tmp_path / "shared.npz", **changes)
    with pytest.raises(errors.TaskError, match=says):
        run("fuse", workshop("weighted_ensemble", "examples: shared.npz\n"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "more", "command", "says"),
    [
        (
            "density_reuse",
            "base: one\n",
            "fuse",
            "recipe.yaml:3: density_reuse combines predictions, not weights: leave out `base`",
        ),
        ("density_reuse", "dtype: float32\n", "fuse", "recipe.yaml:3: .*leave out `dtype`"),
        ("density_reuse", "tasks: mini\n", "fuse", "recipe.yaml:3: .*leave out `tasks`"),
        ("average", "examples: shared.npz\n", "fuse", "recipe.yaml:3: average takes no labelled examples"),
        ("density_reuse", "", "merge", "`eutectic fuse` runs the recipe"),
    ],
)
def test_recipes_that_say_something_impossible(workshop, tmp_path, method, more, command, says):
    with pytest.raises(errors.RecipeError, match=says):
        run(command, workshop(method, more), tmp_path / "out")


@pytest.mark.parametrize("method", ["density_reuse", "mean_ensemble"])
def test_folders_that_are_no_parties_are_refused_by_name_and_nothing_is_left(workshop, tmp_path, method):
    path = workshop(method)
    (tmp_path / "three" / "extra.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(errors.CheckpointError, match=r"three/extra.pt: is a pickle"):
        run("fuse", path, tmp_path / "out")
    (tmp_path / "two" / "party.json").unlink()
    with pytest.raises(errors.CheckpointError, match=r"two/party.json: no such file"):
        run("fuse", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_scored_by_data(tmp_path):
    with pytest.raises(errors.CheckpointError, match="is no ensemble"):
        run("eval", tmp_path, "--data", npz(tmp_path / "x.npz", "test"))


def test_a_rule_that_was_not_fitted_says_so():
    for method in ("weighted_ensemble", "density_reuse_tempered"):
        unfitted = Ensemble(method, parties())
        with pytest.raises(errors.TaskError, match=f"{method} has not been fitted"):
            unfitted(digits("test")[0][:2])


def test_a_folder_that_was_tampered_with_is_refused(workshop, tmp_path):
    run("fuse", workshop(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for changes, says in (({"method": "nonsense"}, "no method is called"), ({"parties": None}, "lacks its method")):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(errors.CheckpointError, match=says):
            eu.load(tmp_path / "out")
