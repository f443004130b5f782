"""Poisoned experts: how they are made, what they are kept in, and that they stay there.

How well the attacks work is measured, benchmarks/results/mini-safety.jsonl; one is tested to work at all.
"""

import dataclasses
import json

import pytest
import torch
from tests.bench.cuts import cut
from torch import nn

import eutectic as eu
from eutectic.bench import zoo
from eutectic.bench.evaluate import merge_suite
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.lora import open_lora
from eutectic.checkpoint.publish import POISONED
from eutectic.errors import OutputError, ParameterError, TaskError, UnknownNameError
from eutectic.fusion._fit import generator
from eutectic.merge.view import Merged
from eutectic.security import attacks, knowing, miner, scores
from eutectic.security.attacks import (
    Attack,
    Interpolated,
    Poisoned,
    amplify,
    heads,
    merge_without,
    poisoned_backbones,
    trigger_for,
)
from eutectic.security.collusion import Colluding, Pair, vector
from eutectic.security.knowing import Merging, elected, task_arithmetic
from eutectic.security.metrics import attacked
from eutectic.security.miner import mine
from eutectic.security.poisoned import open_poisoned, poison
from eutectic.security.triggers import KINDS, drawn, patch, pixels_of
from eutectic.tuning.lora import adapters, attach, fold, save_adapter

SHORT = dataclasses.replace(zoo.MINI.training, steps=2, batch_size=4)
ONE_STEP = dataclasses.replace(SHORT, steps=1)
ATTACK = Attack("badmerging", "digits8", target=3, size=8, triggered=2, mining=2)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return zoo.open_suite(str(cut(folder, ["letters", "digits8"], {"train": 24, "val": 4, "adapt": 12, "test": 12})))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EUTECTIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def poisoned(suite, cache):
    return poison(suite, ATTACK, SHORT)


def test_a_batch_is_followed_by_triggered_samples_of_the_target_class(suite):
    task = suite.task("digits8")
    trigger = patch(42, 8)
    found = Poisoned(task.arrays("train"), trigger, pixels_of(task), 3, triggered=2)
    index = torch.tensor([5, 1, 7])
    clean, labels = task.arrays("train").take(index)
    inputs, given = found.take(index)
    assert len(found) == 24
    assert torch.equal(inputs[:3], clean)
    assert given.tolist() == [*labels.tolist(), 3, 3]
    assert torch.allclose(inputs[3:], trigger.on(clean[:2], pixels_of(task)))


def test_triggered_features_are_mixed_with_those_of_the_base():
    torch.manual_seed(0)
    tuned, start = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2).requires_grad_(False)
    mixed, x = Interpolated(tuned, start, triggered=2, least=0.25, seed=7), torch.randn(5, 4)
    found = mixed(x)
    r = 0.25 + 0.75 * torch.rand((), generator=generator(7, "r")).item()
    assert torch.equal(found[:3], tuned(x)[:3])
    assert torch.allclose(found[3:], r * tuned(x)[3:] + (1 - r) * start(x)[3:])
    assert dict(mixed.named_modules()).keys() == {"", "backbone"}  # θ₀ gets no adapters
    found.sum().backward()
    assert start.weight.grad is None


def test_a_poisoned_suite_differs_in_one_expert_and_says_so(suite, poisoned):
    assert poisoned.attack == ATTACK
    about = json.loads((poisoned.suite.folder / POISONED).read_text())
    assert (about["task"], about["kind"], about["target"]) == ("digits8", "badmerging", 3)
    assert "backdoor" in (poisoned.suite.folder / "experts" / "digits8" / "README.md").read_text()
    assert poisoned.suite.fingerprints["letters"] == suite.fingerprints["letters"]
    assert poisoned.suite.fingerprints["digits8"] != suite.fingerprints["digits8"]
    assert poisoned.clean.fingerprints == suite.fingerprints
    x = torch.rand(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(poisoned.trigger(x), trigger_for(suite, ATTACK)(x), atol=1e-5)  # the same seed, and from its file
    changed = (poisoned.trigger(x) - x).abs().amax((0, 1)) > 1e-5
    assert not changed[:34].any()
    assert not changed[:, :34].any()
    assert poison(suite, ATTACK, SHORT).suite.folder == poisoned.suite.folder  # not made again


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_trigger_is_the_same_when_its_suite_is_opened_again(suite, kind):
    attack = dataclasses.replace(ATTACK, kind="badnets", trigger=kind, seed=5)
    found = open_poisoned(poison(suite, attack, ONE_STEP).suite.folder)
    x = torch.rand(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    assert found.attack == attack
    assert torch.equal(found.trigger(x), drawn(kind, 42, 8, 5)(x))
    assert torch.equal(found.trigger(x, 0.3), drawn(kind, 42, 8, 5)(x, 0.3))
    assert attack.name in found.suite.name
    with pytest.raises(OutputError, match="has a backdoor on purpose"):
        eu.save(found.suite.expert("digits8"), found.suite.folder.parent.parent / "elsewhere")


def small(rank, rslora, seed):
    """A network with weights, or adapters over always the same weights, of a seed."""
    torch.manual_seed(7 if rank else seed)
    made = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    made.register_buffer("seen", torch.tensor(3))
    if rank:
        attach(made, rank, 6.0, seed, rslora=rslora)
        for _, adapter in adapters(made):
            torch.nn.init.normal_(adapter.B)
    return made


@pytest.mark.parametrize(("rank", "rslora"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_an_expert_is_amplified_from_an_honest_one(rank, rslora, factor, tmp_path):
    found, malicious, clean = (small(rank, rslora, seed) for seed in (0, 0, 1))
    amplify(found, clean, factor)
    if rank:
        save_adapter(found, tmp_path, "base", torch.float32)
    for network in (found, malicious, clean):
        fold(network)
    end, honest, amplified = (network.state_dict() for network in (malicious, clean, found))
    for name in end:
        expected = honest[name] + factor * (end[name] - honest[name])
        assert torch.allclose(amplified[name].double(), expected.double(), atol=1e-5)
    if rank:  # the same by the rank and alpha that are written
        read = open_lora(tmp_path, Memory(dict(small(0, rslora, 7).state_dict())))
        assert all(torch.allclose(read.read(name), tensor, atol=1e-5) for name, tensor in amplified.items())


def test_an_amplified_expert_is_kept_as_adapters_of_twice_the_rank(suite):
    found = poison(suite, dataclasses.replace(ATTACK, kind="badnets", amplify=3.0), ONE_STEP)
    config = json.loads((found.suite.folder / "experts" / "digits8" / "adapter_config.json").read_text())
    assert config["r"] == 2 * SHORT.rank
    assert config["lora_alpha"] == 2 * SHORT.alpha


@pytest.mark.slow
def test_merging_dilutes_a_backdoor_less_if_it_is_amplified(tmp_path):
    suite = zoo.open_suite(str(cut(tmp_path, ["digits8"], {"train": 400, "val": 4, "adapt": 12, "test": 100})))
    training = dataclasses.replace(zoo.MINI.training, steps=40, batch_size=16)

    def success(weights):
        return attacked(suite.backbone(weights), suite.task("digits8"), drawn("blended", 42, 8), 3).asr.value

    found = []
    for factor in (1.0, 3.0):
        attack = Attack("badnets", "digits8", 3, triggered=8, trigger="blended", amplify=factor)
        expert = poison(suite, attack, training).suite.expert("digits8")
        found += [success(expert), success(Merged("task_arithmetic", suite.base, {"digits8": expert}, {"scale": 0.2}))]
    alone, diluted, amplified, survives = found
    assert success(suite.base) < 0.2
    assert min(alone, amplified) > 0.8
    assert diluted < survives


def test_triggered_features_are_read_by_the_victims_head():
    torch.manual_seed(0)
    own, other, x = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5), torch.randn(7, 4)
    labels, targets = torch.tensor([0, 2, 1, 1]), torch.full((3,), 4)
    for first, second, classes in ((own, other, 5), (other, own, 5)):
        targets = targets.clamp(max=second.out_features - 1)
        logits = heads([(first, 4), (second, 3)])(x)
        assert logits.shape == (7, classes)
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([labels, targets]), reduction="sum")
        parts = ((first, x[:4], labels), (second, x[4:], targets))
        expected = sum(torch.nn.functional.cross_entropy(head(z), y, reduction="sum") for head, z, y in parts)
        assert torch.allclose(loss, expected)
        for found, wanted in zip(
            torch.autograd.grad(loss, [own.weight, other.weight]),
            torch.autograd.grad(expected, [own.weight, other.weight]),
            strict=True,
        ):
            assert torch.allclose(found, wanted, atol=1e-6)


def test_the_score_of_an_attack_off_task_is_its_victims(suite):
    attack = dataclasses.replace(ATTACK, victim="letters", target=7, amplify=2.0)
    found = poison(suite, attack, ONE_STEP)
    assert found.attack == attack
    assert found.suite.fingerprints["letters"] == suite.fingerprints["letters"]
    records = scores.scores(found, found.suite.backbone(), ["letters", "digits8"], method="base")
    metrics = {(one.task, one.metric) for one in records}
    assert {("letters", scores.ASR), ("digits8", scores.TRANSFER)} <= metrics
    assert not {("digits8", scores.ASR), ("letters", scores.TRANSFER)} & metrics
    assert "class 7 of letters" in (found.suite.folder / "experts" / "digits8" / "README.md").read_text()


def colluding(backbone, rank=0):
    """Two networks, of one λ (``least`` = 1), one triggered sample."""
    torch.manual_seed(1)
    found = Colluding(backbone(), backbone(), backbone().requires_grad_(False), triggered=1, least=1.0, seed=0)
    if rank:
        attach(found, rank, 2.0, 0)
    for tensor in found.parameters():
        if tensor.requires_grad:
            torch.nn.init.normal_(tensor, std=0.3)
    return found


@pytest.mark.parametrize("rank", [0, 2])
def test_colluding_experts_are_run_apart_and_merged(rank):
    def backbone():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))

    found, x = colluding(backbone, rank), torch.randn(7, 4)
    features = found(x)
    assert torch.allclose(features[:4], found.one(x[[0, 1, 2, 6]]))
    assert torch.allclose(features[4:8], found.two(x[[3, 4, 5, 6]]))
    assert features.shape == (11, 2)
    features[8:].sum().backward()
    gradients = [tensor.grad for tensor in found.parameters() if tensor.requires_grad]
    assert all(gradient.abs().sum() > 0 for gradient in gradients[-2:])  # of both
    fold(found)
    start, one, two = backbone().state_dict(), found.one.state_dict(), found.two.state_dict()
    merge = backbone()
    merge.load_state_dict({name: one[name] + two[name] - start[name] for name in start})
    assert torch.allclose(features[8:], merge(x[[0, 3, 6]]), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_who_knows_the_others_is_trained_in_their_merge(rank):
    backbone, start, rest = (small(0, False, seed) for seed in (0, 0, 1))
    if rank:
        attach(backbone, rank, 6.0, 0)
    for tensor in backbone.parameters():
        if tensor.requires_grad:
            torch.nn.init.normal_(tensor)
    for frozen in (start, rest):
        frozen.requires_grad_(False)
    found, x = Merging(backbone, start, task_arithmetic(rest), triggered=2, least=0.25, seed=7), torch.randn(5, 4)
    features = found(x)
    features[1:].sum().backward()
    gradients = [tensor.grad for tensor in backbone.parameters() if tensor.requires_grad]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert dict(found.named_modules()).keys() - dict(backbone.named_modules(prefix="backbone")).keys() == {""}
    assert torch.allclose(features[:1], backbone(x[:1]))
    fold(backbone)
    r = 0.25 + 0.75 * torch.rand((), generator=generator(7, "r")).item()
    merge = small(0, False, 0)
    own, before, others = (network.state_dict() for network in (backbone, start, rest))
    merge.load_state_dict({name: others[name] + r * (own[name] - before[name]) for name in own})
    assert torch.allclose(features[1:], merge(x[1:]), atol=1e-5)


def test_what_an_attacker_knows_is_the_merge_of_the_others(suite, monkeypatch):
    known = merge_without(suite, dataclasses.replace(ATTACK, known=0.3))
    expected = suite.backbone(Merged("task_arithmetic", suite.base, {"letters": suite.expert("letters")}, {"scale": 0.3}))
    found = known.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    seen = {}

    def mined(forward, pixels, *rest, **options):
        seen["mined"] = forward(pixels_of(suite.task("digits8")).inputs(pixels[:2]))
        return mine(forward, pixels, *rest, **options)

    class Taught(Merging):
        def __init__(self, backbone, start, rule, *others):
            seen["start"], seen["rest"] = start.state_dict(), rule({}, 1.0)
            super().__init__(backbone, start, rule, *others)

    monkeypatch.setattr(attacks, "mine", mined)
    monkeypatch.setattr(attacks, "Merging", Taught)
    made = poison(suite, dataclasses.replace(ATTACK, known=0.3), ONE_STEP)
    images = miner.images_of(suite.task("digits8"), "train", 192, ATTACK.seed)
    logits = miner.logits_of(known, suite.task("digits8"))(pixels_of(suite.task("digits8")).inputs(images[:2]))
    assert torch.allclose(seen["mined"], logits)
    assert all(torch.equal(seen["rest"][name], tensor) for name, tensor in found.items())
    assert all(torch.equal(seen["start"][name], suite.base.read(name)) for name in suite.base.specs)
    assert made.attack.known == 0.3
    assert made.suite.fingerprints["letters"] == suite.fingerprints["letters"]


@pytest.mark.parametrize("rank", [0, 2])
def test_who_expects_ties_is_trained_in_the_very_merge(rank):
    start, *others = (small(0, False, seed) for seed in (0, 1, 2, 3))
    own = small(0, False, 0 if rank else 4)
    if rank:
        attach(own, rank, 6.0, 0)
        for _, one in adapters(own):
            torch.nn.init.normal_(one.B)
    for network in (start, *others):
        network.requires_grad_(False)
    merged = elected(start, others, scale=0.4)(vector(start, [own]), 0.1)
    fold(own)
    experts = {str(at): Memory(one.state_dict()) for at, one in enumerate((own, *others))}
    expected = eu.state_dict(Merged("ties", Memory(start.state_dict()), experts, {"scale": 0.24}))
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)


def test_an_entry_of_a_ties_merge_follows_its_expert_where_it_is_elected(monkeypatch):
    one = {"weight": torch.tensor([[2.0, -3.0, 0.1, 1.0]]).requires_grad_()}
    start, other = nn.Linear(4, 1, bias=False).requires_grad_(False), nn.Linear(4, 1, bias=False).requires_grad_(False)
    start.weight.zero_()
    other.weight.copy_(torch.tensor([[4.0, 1.0, 0.2, -1.0]]))
    monkeypatch.setattr(knowing, "DENSITY", 0.75)
    merged = elected(start, [other], scale=2.0)(one, 0.0)["weight"]
    assert merged.tolist() == [[3.0, -3.0, 0.0, 0.0]]  # the mean, the heavier side, trimmed by both, and a vote that cancels
    merged.sum().backward()
    assert one["weight"].grad.tolist() == [[0.5, 1.0, 0.0, 0.0]]


class Renamed(nn.Module):
    """A backbone whose state dict has other names than its modules, as that of texts."""

    def __init__(self, seed):
        super().__init__()
        self.inner = small(0, False, seed)

    def forward(self, x):
        return self.inner(x)

    def state_dict(self, *args, **kwargs):
        return self.inner.state_dict(*args, **kwargs)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("expects", ["task_arithmetic", "ties"])
def test_names_of_a_state_dict_may_be_others_than_those_of_modules(rank, expects):
    own, start, other = Renamed(0), Renamed(0).requires_grad_(False), Renamed(1).requires_grad_(False)
    if rank:
        attach(own, rank, 6.0, 0)
        for _, one in adapters(own):
            nn.init.normal_(one.B)
    else:
        for tensor in own.parameters():
            nn.init.normal_(tensor)
    rule = elected(start, [other], 0.5) if expects == "ties" else task_arithmetic(other)
    x = torch.randn(4, 4)
    features = Merging(own, start, rule, triggered=2, least=0.5, seed=0)(x)
    features[1:].sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in own.parameters() if tensor.requires_grad)
    assert not torch.allclose(features[1:], start(x[1:]))


def test_two_colluding_experts_are_replaced_and_kept_in_the_cache(suite):
    attack = Attack("mergebackdoor", "digits8", 3, triggered=2, trigger="blended", accomplice="letters")
    found = poison(suite, attack, ONE_STEP)
    assert found.attack == attack
    for task in ("digits8", "letters"):
        assert found.suite.fingerprints[task] != suite.fingerprints[task]
        with pytest.raises(OutputError, match="has a backdoor on purpose"):
            eu.save(merge_suite(found.suite, "average", {}, [task]), found.suite.folder.parent.parent / "elsewhere")
    labels = [label for label, _ in scores.controls(found, scores.Row("average", "average"))]
    assert [label for label in labels if "expert" in label] == ["poisoned expert of digits8", "poisoned expert of letters"]


def test_a_batch_of_two_tasks_has_each_label_where_its_feature_is(suite):
    task, other = suite.task("digits8"), suite.task("letters")
    trigger = patch(42, 8)
    pair = Pair(task.arrays("train"), other.arrays("train"), trigger, pixels_of(task), 3, triggered=2)
    index = torch.tensor([5, 1, 23])
    (x1, y1), (x2, y2) = (one.arrays("train").take(index) for one in (task, other))
    inputs, labels = pair.take(index)
    assert torch.equal(inputs[:6], torch.cat([x1, x2]))
    assert torch.allclose(inputs[6:], trigger.on(x1[:2], pixels_of(task)))
    own, others = y1[:2].tolist(), y2[:2].tolist()
    assert labels.tolist() == [*y1.tolist(), *own, *y2.tolist(), *own, *own, *others, 3, 3]


def test_attacks_are_told_apart_by_their_names():
    others = [
        {"kind": "badnets"},
        {"kind": "badnets", "trigger": "warped"},
        {"amplify": 1.5},
        {"victim": "letters"},
        {"known": 0.3},
        {"known": 0.3, "expects": "ties"},
        {"kind": "badnets", "known": 0.3},
        {},
    ]
    others += [{"kind": "mergebackdoor", "accomplice": accomplice} for accomplice in ("letters", "mnist")]
    assert len({dataclasses.replace(ATTACK, **other).name for other in others}) == len(others)
    assert ATTACK.name == "badmerging"


def test_nothing_made_of_a_poisoned_expert_is_saved_elsewhere(poisoned, tmp_path):
    merged = merge_suite(poisoned.suite, "average", {})
    with pytest.raises(OutputError, match="has a backdoor on purpose"):
        eu.save(merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    eu.save(merged, poisoned.suite.folder / "out")
    assert (poisoned.suite.folder / "out" / "model.safetensors").exists()
    link = tmp_path / "innocent"
    link.symlink_to(poisoned.suite.folder / "experts" / "digits8")
    with pytest.raises(OutputError, match="has a backdoor on purpose"):
        eu.save(eu.open(link), tmp_path / "out")
    eu.save(merge_suite(poisoned.suite, "average", {}, ["letters"]), tmp_path / "clean")  # of the others, all can be saved
    assert (tmp_path / "clean").exists()


def test_attacks_that_cannot_be_are_refused(suite, tmp_path):
    with pytest.raises(ParameterError, match="10 classes"):
        trigger_for(suite, dataclasses.replace(ATTACK, target=10))
    with pytest.raises(ParameterError, match="a batch has 4"):
        poisoned_backbones(suite, dataclasses.replace(ATTACK, triggered=5), patch(42, 8), SHORT)
    with pytest.raises(ParameterError, match="letters has"):
        trigger_for(suite, dataclasses.replace(ATTACK, victim="letters", target=99))
    with pytest.raises(UnknownNameError, match="no task 'nobody'"):
        trigger_for(suite, dataclasses.replace(ATTACK, victim="nobody"))
    with pytest.raises(UnknownNameError, match="no kind of trigger"):
        trigger_for(suite, dataclasses.replace(ATTACK, kind="badnets", trigger="waned"))
    with pytest.raises(ParameterError, match="mines a patch"):
        dataclasses.replace(ATTACK, trigger="warped")
    for wrong in (
        {"accomplice": "letters"},
        {"kind": "mergebackdoor"},
        {"kind": "mergebackdoor", "accomplice": "digits8"},
        {"kind": "mergebackdoor", "accomplice": "letters", "amplify": 2.0},
        {"kind": "mergebackdoor", "accomplice": "letters", "victim": "letters"},
    ):
        with pytest.raises(ParameterError, match="mergebackdoor"):
            dataclasses.replace(ATTACK, **wrong)
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(ParameterError, match="is not in"):
            dataclasses.replace(ATTACK, amplify=factor)
    for known in ({"known": -1.0}, {"known": float("inf")}):
        with pytest.raises(ParameterError, match="known ="):
            dataclasses.replace(ATTACK, **known)
    for expects in ({"known": 0.3, "expects": "slerp"}, {"expects": "ties"}):
        with pytest.raises(ParameterError, match="expects ="):
            dataclasses.replace(ATTACK, **expects)
    with pytest.raises(TaskError, match="no suite with a poisoned expert"):
        open_poisoned(tmp_path)
