"""Experts of a small cut of the packaged suite: made, opened again, merged as they grow in number, and compared."""

import json

import pytest
import torch
from tests.bench.cuts import cut
from typer.testing import CliRunner

from eutectic import cli, record
from eutectic.bench import growing, tuned, vectors, zoo
from eutectic.bench.evaluate import Choice
from eutectic.bench.suite import Suite
from eutectic.checkpoint.peft import open_adapter
from eutectic.errors import LayoutError, OutputError, ParameterError, TaskError, UnknownNameError
from eutectic.merge.api import state_dict
from eutectic.merge.run import verify
from eutectic.tuning.tangent import Tangent
from eutectic.tuning.trainer import Training

TASKS = ("mnist", "letters", "digits8")
SIZES = {"train": 40, "val": 8, "adapt": 8, "test": 16}
KINDS = ("full", "lora", "l_lora", "l_lora_whole")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Suite(cut(tmp_path_factory.mktemp("cut"), TASKS, SIZES))


def trained(kind, **changes):
    given = {"steps": 2, "lr": 1e-2, "batch_size": 4, "kind": kind} | ({} if kind == "full" else {"rank": 2})
    return Training(**given | changes)


@pytest.fixture(scope="module")
def made(suite, tmp_path_factory):
    """Experts of one task or two of each kind."""
    folder = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        (folder / kind).mkdir()
        for task in {"full": TASKS[:1], "l_lora_whole": TASKS[1:2]}.get(kind, TASKS[:2]):
            records = tuned.make_expert(suite, task, trained(kind), folder / kind / task)
            record.append(folder / f"{kind}.jsonl", records)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_scores_as_it_did_when_it_was_made(suite, made, kind):
    for found in record.load(made / f"{kind}.jsonl"):
        network, weights = tuned.loaded(suite, made / kind / found.task)
        assert suite.task(found.task).score(network, found.split).value == found.value
        assert (found.method, found.parameters["steps"], found.suite) == (kind, 2, "cut")
        assert isinstance(network, Tangent) is (kind == "l_lora_whole")
        assert weights.specs == suite.base.specs
        assert any(not torch.equal(weights.read(name), suite.base.read(name)) for name in weights.specs)
        assert verify(made / kind / found.task) == []


def test_adapters_of_one_seed_share_a_and_linearised_ones_leave_it(suite, made, tmp_path):
    def first(*path):
        adapter = open_adapter(made.joinpath(*path))
        return adapter.right(next(iter(adapter.targets)))

    assert torch.equal(first("l_lora", "mnist"), first("l_lora", "letters"))
    assert torch.equal(first("l_lora", "mnist"), first("l_lora_whole", "letters"))
    assert not torch.equal(first("lora", "mnist"), first("lora", "letters"))
    tuned.make_expert(suite, "mnist", trained("l_lora", seed=1, rslora=True), tmp_path / "out")
    assert not torch.equal(open_adapter(tmp_path / "out").right("encoder.layer.0.mlp.fc1.weight"), first("l_lora", "mnist"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is True


def test_settings_are_the_suites_unless_told(suite):
    assert tuned.training_for(suite, "lora") == zoo.MINI.training
    full = tuned.training_for(suite, "full", steps=5)
    assert (full.rank, full.steps, full.shift) == (0, 5, 2)
    linear = tuned.training_for(suite, "l_lora", rank=4, alpha=1.0, seed=3)
    assert (linear.rank, linear.alpha, linear.seed, linear.kind) == (4, 1.0, 3, "l_lora")
    assert linear.lr != zoo.MINI.training.lr
    with pytest.raises(ParameterError, match="rank = 0"):
        tuned.training_for(suite, "l_lora", rank=0)
    with pytest.raises(ParameterError, match="leave the rank out"):
        tuned.training_for(suite, "full", rank=2)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code != 0
    return result.exception


def test_the_command_makes_an_expert_that_eval_scores(suite, tmp_path):
    given = ["--suite", suite.folder, "--task", "mnist", "--kind", "l_lora", "--steps", 2, "--lr", 0.01, "--rank", 2]
    result = run("tune", *given, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.output.split("\n") if line] == [["mnist,", "val"], ["mnist,", "test"]]
    result = run("eval", tmp_path / "out", "--suite", suite.folder, "--json")
    found = json.loads(result.output.splitlines()[0])
    assert (found["method"], found["parameters"]["rank"], found["task"]) == ("l_lora", 2, "mnist")
    assert isinstance(refused("tune", *given, tmp_path / "out"), OutputError)
    assert run("tune", *given, "--force", "--json", tmp_path / "out").exit_code == 0


def test_bad_input_is_refused_and_leaves_nothing(suite, tmp_path):
    given = ["tune", "--suite", suite.folder, "--steps", 8, tmp_path / "out"]
    for error, said, arguments in (
        (UnknownNameError, "no task 'minst'.* Did you mean 'mnist'", ["--task", "minst"]),
        (ParameterError, "rank = 0: kind 'lora' needs a rank", ["--task", "mnist", "--rank", 0]),
        (ParameterError, "rank = 385: the matrix of 'encoder.layer.0", ["--task", "mnist", "--rank", 385]),
        (ParameterError, "lr = 0.0: give a positive number", ["--task", "mnist", "--lr", 0]),
    ):
        with pytest.raises(error, match=said):
            raise refused(*given, *arguments)
    broken = refused(*given, "--task", "mnist", "--kind", "full", "--lr", 1e30)
    assert str(broken).startswith("task 'mnist', step ")
    assert list(tmp_path.iterdir()) == []


def test_a_study_follows_growing_numbers_of_tasks(suite, made, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "training_for", lambda suite, kind, seed: trained(kind, seed=seed))
    experts = tmp_path / "experts"
    experts.mkdir()
    (experts / "l_lora").mkdir()
    for task in TASKS[:2]:
        (experts / "l_lora" / task).symlink_to(made / "l_lora" / task)
    choices = [Choice("task_arithmetic")]
    records = list(growing.growing(suite, choices, experts, ("lora", "l_lora"), TASKS))
    assert (experts / "l_lora" / "digits8" / "adapter_config.json").exists()  # what was missing
    assert not (experts / "lora").exists()  # the suite's own are of that kind
    own = {(one.method, one.task): one.value for one in records if one.method.endswith("individual")}
    assert {method for method, _ in own} == {"lora: individual", "l_lora: individual"}
    rows = {}
    for one in records:
        rows.setdefault((one.method, one.protocol, one.metric), []).append(one)
    for kind in ("lora", "l_lora"):
        for n in (2, 3):
            row, study = f"{kind}: task_arithmetic", f"tuning, {n} tasks; inductive"
            *tasks, mean = rows[row, study, "accuracy"]
            assert [one.task for one in tasks] == list(TASKS[:n])
            assert mean.value == pytest.approx(sum(one.value for one in tasks) / n)
            (share,) = rows[row, study, "normalised accuracy"]
            expected = [one.value / own[f"{kind}: individual", one.task] for one in tasks]
            assert share.value == pytest.approx(sum(expected) / n)
            assert share.low <= share.value <= share.high
    assert any("chosen on val among 10 candidates" in one.notes for one in records)
    pytest.importorskip("matplotlib")
    from eutectic.bench.fronts import figure

    growing.plot(records, tmp_path / "tuning.svg", figure())
    drawn = (tmp_path / "tuning.svg").read_text()
    assert "l_lora: task_arithmetic" in drawn
    assert "normalised accuracy, %" in drawn
    with pytest.raises(TaskError, match="two tasks or more, not of mnist"):
        next(growing.growing(suite, choices, experts, tasks=("mnist", "mnist")))


def flat(checkpoint, base):
    return torch.cat([(checkpoint.read(name) - base.read(name)).reshape(-1).double() for name in base.specs])


def test_cosines_are_those_of_the_whole_task_vectors(suite):
    found = vectors.cosines(suite.base, suite.experts())
    whole = torch.nn.functional.normalize(torch.stack([flat(e, suite.base) for e in suite.experts().values()]))
    torch.testing.assert_close(found, whole @ whole.T, rtol=1e-5, atol=1e-7)
    with pytest.raises(LayoutError, match="expert 'same' has the base's weights"):
        vectors.cosines(suite.base, {"same": suite.base})


def test_disentanglement_counts_changed_predictions(suite, made):
    """Nothing changes where the other's scale is 0; elsewhere it is counted here without the grid."""
    scales = (0.0, 1.0)
    changed, n = vectors.disentanglement(suite, TASKS[:2], scales, samples=6)
    assert n.tolist() == [6, 6]
    assert not changed[0, :, 0].any()
    assert not changed[1, 0, :].any()
    base, one, two = (state_dict(c) for c in (suite.base, suite.expert("mnist"), suite.expert("letters")))
    network = suite.backbone()
    outputs = []
    for weights in (one, {name: one[name] + two[name] - base[name] for name in base}):
        network.load_state_dict(weights)
        inputs, _ = suite.arrays("mnist", "adapt").take(torch.arange(6))
        outputs.append(suite.task("mnist").head(network(inputs)).argmax(1))
    assert changed[0, 1, 1] == (outputs[0] != outputs[1]).sum()
    with pytest.raises(TaskError, match="of two tasks, not of mnist"):
        vectors.disentanglement(suite, ["mnist"])


def test_the_command_draws_vectors(suite, made, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(vectors.vectors, "__defaults__", ((), (0.0, 1.0), 4, lambda line: None))
    given = ["bench", suite.folder, "--study", "vectors", "--out", tmp_path / "out", "--experts", made / "l_lora"]
    result = run(*given, "--task", "mnist", "--task", "letters")
    assert result.exit_code == 0, result.exception
    assert "cosines of 1 pair(s) of task vectors" in result.output
    assert "disentanglement error of mnist, letters: mean" in result.output
    found = list(record.load(tmp_path / "out" / "vectors.jsonl"))
    assert [one.metric for one in found] == ["cosine"] + 4 * ["disentanglement error"]
    assert all(one.low <= one.value <= one.high for one in found)
    drawn = (tmp_path / "out" / "vectors.svg").read_text()
    assert "λ of letters" in drawn
    for arguments in (["--study", "robustness", "--task", "mnist"], ["--experts", made]):
        assert "--" in str(refused("bench", suite.folder, *arguments))
