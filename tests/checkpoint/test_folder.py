"""Model folders: which file is opened, what is copied beside it, and what never is."""

from __future__ import annotations

import builtins
import json
import sys
import types

import pytest
import torch

from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.folder import copy_side_files, from_hub, model_card, open_folder, open_path, provenance
from eutectic.checkpoint.safetensors import SafetensorsFile, Sharded
from eutectic.checkpoint.save import save_tensors
from eutectic.errors import CheckpointError, MissingDependencyError

TENSORS = {"v": torch.zeros(2), "w": torch.ones(2)}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


def test_opens_a_single_file(folder):
    save_tensors(Memory(TENSORS), folder)
    (folder / "consolidated.safetensors").write_bytes(b"ignored")
    (folder / "pytorch_model.bin").write_bytes(b"ignored")
    for checkpoint in (open_folder(folder), open_path(folder), open_path(str(folder / "model.safetensors"))):
        assert isinstance(checkpoint, SafetensorsFile)
        assert checkpoint.read("w").tolist() == [1, 1]


def test_opens_shards(folder):
    save_tensors(Memory(TENSORS), folder, max_shard_bytes=8)
    for checkpoint in (open_folder(folder), open_path(folder), open_path(folder / "model.safetensors.index.json")):
        assert isinstance(checkpoint, Sharded)
        assert checkpoint.read("w").tolist() == [1, 1]


def test_opens_the_only_file_whatever_its_name(folder):
    save_tensors(Memory(TENSORS), folder)
    (folder / "model.safetensors").rename(folder / "finetuned.safetensors")
    assert open_folder(folder).read("w").tolist() == [1, 1]


def test_opens_the_only_index_whatever_its_name(folder):
    save_tensors(Memory(TENSORS), folder, max_shard_bytes=8)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    assert open_folder(folder).read("w").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], "model: is empty"),
        (["config.json"], r"model: holds no \.safetensors file"),
        (
            ["config.json", "pytorch_model.bin"],
            r"only pickled weights \(pytorch_model\.bin\).*convert the weights to safetensors",
        ),
        (["x.ckpt"], "only pickled weights"),
        (["x.pt"], "only pickled weights"),
        (["x.pth"], "only pickled weights"),
        (["x.pkl"], "only pickled weights"),
        (["a.safetensors", "b.safetensors"], r"2 candidates \(a\.safetensors, b\.safetensors\)"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "2 candidates"),
        (["model.safetensors", "model.safetensors.index.json"], "has both model.safetensors.index.json and model.safetensors"),
        (["a.safetensors", "a.safetensors.index.json"], "has both a.safetensors.index.json and a.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter"),
    ],
)
def test_folders_without_one_answer_are_refused(files, what, folder):
    for file in files:
        (folder / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=what):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("none", "none: no such file or folder"),
        ("weights.bin", "weights.bin: is a pickle"),
        ("notes.txt", "notes.txt: is neither a folder nor a .safetensors file"),
    ],
)
def test_paths_that_are_nothing_are_refused(name, what, folder):
    if name != "none":
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=what):
        open_path(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: (no such folder|is not a folder)"):
        open_folder(folder / name)


def test_weights_that_link_out_of_the_folder_are_refused(folder, tmp_path):
    save_tensors(Memory(TENSORS), tmp_path)
    (folder / "model.safetensors").symlink_to("../model.safetensors")
    with pytest.raises(CheckpointError, match=r"model: 'model\.safetensors' leads out of its folder"):
        open_folder(folder)
    assert open_path(folder / "model.safetensors").read("w").tolist() == [1, 1]  # named by the user, not by the folder


# ── side files ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_copies_configs_and_tokenizer_but_no_code_and_no_weights(folder, target):
    wanted = [
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "modules.json",
        "1_Pooling/config.json",
        "additional_chat_templates/a.jinja",
    ]
    for name in wanted:
        write_json(folder / name, {"name": name})
    for name in (
        "modeling_evil.py",
        "model.safetensors",
        "pytorch_model.bin",
        "README.md",
        "1_Pooling/evil.py",
        ".env",
        "tokenizer.py",
    ):
        (folder / name).write_text("no")
    assert sorted(copy_side_files(folder, target)) == sorted(wanted)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()) == sorted(wanted)
    assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_configs_keep_their_bytes_unless_something_changes(folder, target):
    (folder / "config.json").write_text('{"dtype":   "float32"}')
    copy_side_files(folder, target, torch.float32)
    assert (target / "config.json").read_text() == '{"dtype":   "float32"}'


def test_rewrites_the_dtype_and_drops_remote_code(folder, target):
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float16", "n": 1},
        "auto_map": {"AutoModel": "evil.M"},
        "dtype": None,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.T"}, "dtype": "kept"})
    copy_side_files(folder, target, torch.bfloat16)
    assert json.loads((target / "config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "n": 1},
        "dtype": None,
    }
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"dtype": "kept"}


def test_a_config_that_is_no_json_is_named(folder, target):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model/config\.json is not a JSON object"):
        copy_side_files(folder, target)


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_side_file_that_links_out_of_the_folder_is_refused(name, folder, target, tmp_path):
    write_json(tmp_path / "secret" / "config.json", {})
    if "/" in name:
        (folder / "1_Pooling").symlink_to("../secret")
    else:
        (folder / name).symlink_to("../secret/config.json")
    with pytest.raises(CheckpointError, match=f"'{name}' leads out of its folder"):
        copy_side_files(folder, target)
    assert list(target.iterdir()) == []


def test_side_files_in_a_hub_cache_are_copied_as_files(tmp_path, target):
    snapshot, blobs = tmp_path / "models--me" / "snapshots" / "123", tmp_path / "models--me" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/hash")
    assert copy_side_files(snapshot, target) == ["tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()


# ── card, provenance, hub ─────────────────────────────────────────────────────────────────────────────────────────────


def test_model_card_has_front_matter_recipe_and_citations():
    recipe = "method: ties\nnote: '```'\n"
    card = model_card(
        title="Mix", method="ties", base_model=["me/base: x"], models=["a", "b"], recipe=recipe, citations=["Yadav 2023"]
    )
    assert card.startswith('---\nlibrary_name: "transformers"\ntags:\n- merge\n- eutectic\nbase_model:\n- "me/base: x"\n---\n')
    assert "````yaml\nmethod: ties\nnote: '```'\n````\n" in card
    assert "- Yadav 2023\n" in card
    assert "Citation" not in model_card(title="Mix", method="ties", base_model=[], models=["a"], recipe="")


def test_provenance_is_readable_json():
    text = provenance({"recipe": {"λ": 0.3}})
    assert json.loads(text) == {"recipe": {"λ": 0.3}}
    assert text == '{\n  "recipe": {\n    "λ": 0.3\n  }\n}\n'


def test_hub_downloads_no_code_and_no_pickles(folder, monkeypatch):
    asked = {}
    hub = types.SimpleNamespace(
        snapshot_download=lambda repo_id, **options: asked.update(options, repo_id=repo_id) or str(folder)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert from_hub("me/it", revision="v1") == folder
    assert (asked["repo_id"], asked["revision"]) == ("me/it", "v1")
    assert not any("py" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("error", [ValueError("bad id"), OSError("offline"), RuntimeError()])
def test_hub_errors_are_ours(error, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=fail))
    with pytest.raises(CheckpointError, match="'me/it' is neither a local path nor reachable as a hub id"):
        from_hub("me/it")


def test_a_missing_hub_package_names_the_extra(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **options):
        if name == "huggingface_hub":
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"pip install 'eutectic\[hub\]'"):
        from_hub("me/it")
