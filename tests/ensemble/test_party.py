"""A party's folder: what goes in comes out, and what cannot be trusted is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.ensemble.parties import about_of, digits, party

from eutectic import errors
from eutectic.ensemble._networks import MLP, Classifier, Normalisation, ResNet
from eutectic.ensemble._party import About, Party, learn_density, open_party, write_party


@pytest.fixture
def folder(tmp_path):
    write_party(party("two"), tmp_path / "two")
    return tmp_path / "two"


def test_a_folder_says_what_the_party_says(folder):
    images, _ = digits("test")
    before, after = party("two"), open_party(folder)
    assert after.about == before.about
    with torch.no_grad():
        assert torch.equal(after.log_predictions(images), before.log_predictions(images))
        assert torch.equal(after.log_density(images), before.log_density(images))
    assert after.fingerprints() == before.fingerprints()
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "classifier/model.safetensors",
        "density/model.safetensors",
        "party.json",
    ]


def test_a_folder_is_replaced_only_if_that_is_asked_for(folder):
    with pytest.raises(errors.OutputError, match="exists already"):
        write_party(party("one"), folder)
    write_party(party("one"), folder, replace=True)
    assert open_party(folder).about.classes == party("one").about.classes


def test_no_image_of_the_party_is_in_its_folder(folder):
    images, _ = digits("train")
    about = about_of("two")
    kept = {f"{p.parent.name}.{name}": t for p in folder.rglob("*.safetensors") for name, t in load_file(p).items()}
    for rows in (images.flatten(1), about.space.into(images)):
        for name, tensor in kept.items():
            if tensor.ndim == 2 and tensor.shape[1] == rows.shape[1]:
                assert torch.cdist(rows, tensor).min() > 1e-3, name


def test_a_party_with_one_class_and_no_density_is_a_party(tmp_path):
    about = About(classes=("cat",), counts=(3,), shape=(4,), classifier=MLP(widths=(2,)))
    write_party(Party(about, about.network()), tmp_path / "cat")
    found = open_party(tmp_path / "cat")
    assert torch.equal(found.log_predictions(torch.randn(5, 4)), torch.zeros(5, 1))
    with pytest.raises(errors.CheckpointError, match="cat: has no density model; train one"):
        found.log_density(torch.randn(5, 4))


def test_residual_networks_are_described_too(tmp_path):
    about = About(classes=("a", "b"), counts=(1, 1), shape=(3, 8, 8), classifier=ResNet(channels=(4, 8)))
    made = Party(about, about.network().eval())
    write_party(made, tmp_path / "p")
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(open_party(tmp_path / "p").log_predictions(x), made.log_predictions(x))


def test_an_image_classifier_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        **{"image_size": 8, "patch_size": 4, "num_labels": 2},
    )
    network = transformers.ViTForImageClassification(config)
    about = About(
        **{"classes": ("a", "b"), "counts": (1, 1), "shape": (3, 6, 6), "classifier": {"architecture": "transformers"}},
        normalisation=Normalisation(size=(8, 8)),
    )
    made = Party(about, Classifier(network, about.normalisation, about.shape).eval())
    write_party(made, tmp_path / "p")
    x = torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(open_party(tmp_path / "p").log_predictions(x), made.log_predictions(x))
    changed = about.model_copy(update={"classes": ("a", "b", "c"), "counts": (1, 1, 1)})
    write_party(Party(changed, made.classifier), tmp_path / "q")
    with pytest.raises(errors.CheckpointError, match="gives 2 logits for 3 classes"):
        open_party(tmp_path / "q")


def _edit(folder, **changes):
    path = folder / "party.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"counts": [5, 0, 5, 5]}, errors.CheckpointError, r"party.json: counts.1: .*greater than or equal to 1"),
        ({"counts": [5, 5]}, errors.CheckpointError, "need as many counts"),
        ({"classes": ["a", "a", "b", "c"]}, errors.CheckpointError, "each once"),
        ({"classes": []}, errors.CheckpointError, "party.json: classes"),
        ({"classifier": {"architecture": "eval"}}, errors.CheckpointError, "party.json: classifier"),
        ({"code": "import os"}, errors.CheckpointError, "party.json: code: Extra inputs"),
        ({"classifier": {"architecture": "mlp", "widths": [10**12]}}, errors.LayoutError, "does not fit the network"),
        ({"space": None}, errors.CheckpointError, "a `density` needs a `space`"),
        ({"space": {"kind": "cosines", "size": 5}}, errors.LayoutError, "does not fit the network that party.json"),
        ({"normalisation": {"mean": [0, 0], "std": [1]}}, errors.CheckpointError, "does not fit inputs"),
        ({"normalisation": {"mean": [0], "std": [0]}}, errors.CheckpointError, "normalisation.std"),
    ],
)
def test_a_folder_that_is_inconsistent_is_refused(folder, changes, error, says):
    _edit(folder, **changes)
    with pytest.raises(error, match=says):
        open_party(folder)


def test_a_folder_that_holds_a_pickle_is_not_read(folder):
    (folder / "density" / "extra.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(errors.CheckpointError, match=r"density/extra.pt: is a pickle, so nothing of .* is read"):
        open_party(folder)


def test_what_no_density_is_learned_of_is_refused():
    images, labels = digits("train")
    about = about_of("one")
    with pytest.raises(errors.TaskError, match=r"none of classes \[1, 2, 3\]"):
        learn_density(about, images[:20], torch.tensor([0, 4] * 10))
    with pytest.raises(errors.TaskError, match=r"are not of the shape \[1, 8, 8\]"):
        learn_density(about, images[:20, :, :4], labels[:20])
    with pytest.raises(errors.CheckpointError, match="describes no density"):
        learn_density(about_of("one", density=None, space=None), images, labels)
