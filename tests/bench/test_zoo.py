"""Making suites: splits, a shortened build, resuming it; and what the packaged suite holds."""

import dataclasses

import numpy as np
import pytest
import torch

from eutectic.bench import evaluate as scoring
from eutectic.bench import sources, zoo
from eutectic.checkpoint.folder import open_folder
from eutectic.checkpoint.hashed import fingerprint
from eutectic.errors import LayoutError, RecipeError, TaskError, UnknownNameError
from eutectic.merge import run
from eutectic.merge.recipe import Recipe
from eutectic.task import SPLITS

SHORT = dataclasses.replace(
    zoo.MINI, tasks=("mnist", "letters"), training=dataclasses.replace(zoo.MINI.training, steps=4, batch_size=8)
)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return zoo.build(SHORT, tmp_path_factory.mktemp("zoo") / "short")


def test_a_shortened_build_makes_real_experts_and_carries_on_where_it_stopped(short, tmp_path):
    assert list(short.classes) == ["mnist", "letters"]
    for name, expert in short.experts().items():
        changed = [n for n in expert.specs if not torch.equal(expert.read(n), short.base.read(n))]
        assert changed, name
        assert all(n.endswith("weight") for n in changed), name

    def stop(task, done, total):
        if task == "letters":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.build(SHORT, tmp_path / "again", progress=stop)
    with pytest.raises(TaskError, match="stopped before letters"):
        zoo.open_suite(str(tmp_path / "again"))
    steps = []
    again = zoo.build(SHORT, tmp_path / "again", progress=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == [5, 6, 7, 8]
    for name, expert in again.experts().items():  # one machine, one seed: the same bits
        for tensor in expert.specs:
            assert torch.equal(expert.read(tensor), short.expert(name).read(tensor))
    with pytest.raises(TaskError, match="other settings"):
        zoo.build(dataclasses.replace(SHORT, shots=3), tmp_path / "again")


def test_suites_that_are_not_there_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setenv("EUTECTIC_CACHE", str(tmp_path))
    with pytest.raises(TaskError, match="eutectic zoo build dino"):
        zoo.open_suite("dino")
    with pytest.raises(UnknownNameError, match="Did you mean 'dino'"):
        zoo.open_suite("dimo")
    with pytest.raises(TaskError, match="--data"):
        zoo.build(zoo.DINO, tmp_path / "dino", base=zoo.packaged() / "base")


def test_the_packaged_suite_is_what_its_settings_say():
    suite = zoo.open_suite("mini")
    assert len(suite.classes) == 8
    seen: set[bytes] = set()
    for task in suite.tasks:
        for split in SPLITS:
            arrays = task.arrays(split)
            assert 0 < len(arrays) <= zoo.MINI.sizes[split]
            assert int(arrays.labels.max()) < len(suite.classes[task.name])
        inputs = [row.numpy().tobytes() for split in SPLITS for row in task.arrays(split).inputs]
        assert len(set(inputs)) == len(inputs), f"{task.name}: an image stands in two splits"
        assert not seen & set(inputs)
        seen |= set(inputs)


def test_splits_are_disjoint_and_duplicates_go_to_the_test_split_only():
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)
    raw = sources.Raw(
        (np.concatenate([images[:20], images[:5], images[25:]]), np.arange(30)), (images[20:], np.arange(10)), ["a"]
    )
    parts = sources.split(raw, {"train": 9, "val": 3, "adapt": 4, "test": 10}, seed=0)
    values = {name: set(inputs.ravel().tolist()) for name, (inputs, _) in parts.items()}
    assert {name: len(found) for name, found in values.items()} == {"train": 9, "val": 3, "adapt": 4, "test": 10}
    assert values["test"] == set(range(20, 30))
    assert len(set.union(*values.values())) == 26


def test_raw_data_that_is_no_data_set_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"neither a\.npz nor a\.jsonl\.gz"):
        sources.load_raw(tmp_path, "a")
    np.savez(tmp_path / "a.npz", train_images=np.zeros(1))
    with pytest.raises(TaskError, match=r"a\.npz.*train_labels"):
        sources.load_raw(tmp_path, "a")
    np.savez(tmp_path / "b.npz", train_images=np.array([{}], object), train_labels=np.zeros(1))
    with pytest.raises(TaskError, match=r"b\.npz"):  # a pickle inside
        sources.load_raw(tmp_path, "b")


def test_scores_of_a_saved_merge_equal_those_of_the_merge_in_memory(short, tmp_path):
    recipe = Recipe(method="ties", suite=str(short.folder), parameters={"scale": 3.0})
    merged = scoring.suite_recipe(recipe)
    network = short.backbone(merged)
    in_memory = scoring.evaluate(network, short.tasks)
    out = run.save(merged, tmp_path / "out", recipe=recipe)
    saved = scoring.evaluate(short.backbone(open_folder(out)), short.tasks, **scoring.fields_of(out))
    assert [r.value for r in saved] == [r.value for r in in_memory]
    assert {(r.method, r.recipe_sha256) for r in saved} == {("ties", recipe.sha256())}
    from transformers import AutoModel

    AutoModel.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert fingerprint(open_folder(tmp_path / "again")) == fingerprint(open_folder(out)) == fingerprint(merged)


def test_suite_recipes_choose_among_the_suites_experts(short):
    folder = str(short.folder)
    assert list(scoring.suite_recipe(Recipe(method="average", suite=folder, experts=["letters"])).experts) == ["letters"]
    with pytest.raises(RecipeError, match="only names among mnist, letters"):
        scoring.suite_recipe(Recipe(method="average", suite=folder, experts=["fashion"]))
    with pytest.raises(RecipeError, match="twice"):
        scoring.suite_recipe(Recipe(method="average", suite=folder, experts=["mnist", "mnist"]))
    with pytest.raises(LayoutError, match="no experts"):
        scoring.suite_recipe(Recipe(method="average", suite=folder, experts=[]))
    assert list(scoring.suite_recipe(Recipe(method="average", suite=folder, experts={"digits": "mnist"})).experts) == ["digits"]
    with pytest.raises(RecipeError, match="leave out `base`"):
        scoring.suite_recipe(Recipe(method="average", suite=folder, base="x"))


def test_a_run_scores_everything_and_chooses_scalars_on_val_only(short):
    records = list(scoring.run_suite(short, [scoring.Choice("average"), scoring.Choice("task_arithmetic")]))
    assert [(r.method, r.task) for r in records] == [
        (method, task)
        for method in ("pretrained", "individual", "average", "task_arithmetic")
        for task in ("mnist", "letters", "mean")
    ]
    assert {r.split for r in records} == {"test"}
    assert all(r.low <= r.value <= r.high for r in records)
    chosen = records[-1]
    assert "chosen on val among 5" in chosen.notes
    assert chosen.parameters["scale"] in (0.1, 0.15, 0.2, 0.3, 0.4)
    # the choice is the argmax over val, recomputed here without the shortcut
    network, val = short.backbone(), []
    for candidate in scoring.grid("task_arithmetic"):
        scoring.filled(network, scoring.merge_suite(short, "task_arithmetic", candidate))
        val.append(sum(task.score(network, "val").value for task in short.tasks))
    assert chosen.parameters["scale"] == list(scoring.grid("task_arithmetic"))[val.index(max(val))]["scale"]
