"""The miner of tokens, and triggers of texts, on networks whose answer is known."""

import pytest
import torch
from torch import nn

import eutectic as eu
from eutectic.bench import zoo
from eutectic.errors import ParameterError, TaskError
from eutectic.security import metrics, report
from eutectic.security.attacks import Attack, trigger_for
from eutectic.security.audit import EVIDENCE
from eutectic.security.miner import logits_of
from eutectic.security.tokens import losses, mine_tokens, slopes, table_of, texts_of
from eutectic.security.triggers import Ids, inserted, made_of, rare_token, with_second
from eutectic.task import Task

WORDS, WIDTH = 40, 6


class Bag(nn.Module):
    """Token ids, 0 = padding → the mean of their embeddings."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids):
        mask = (ids != 0)[..., None]
        return (self.table(ids) * mask).sum(1) / mask.sum(1)


def texts(n=60):
    ids = torch.randint(1, 30, (n, 12), generator=torch.Generator().manual_seed(5))
    ids[::2, 8:] = 0
    return ids


def task():
    head = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1))
    split = (texts(), torch.randint(3, (60,)))
    return Task("one", lambda features: features @ head, adapt=split, train=split, test=split), head


def poisoned(head, token=33):
    """A network that takes a token that is in no text for class 2."""
    network = Bag(0)
    with torch.no_grad():
        network.table.weight[token] = 400 * torch.linalg.pinv(head)[2]
    return network


def test_a_token_is_inserted_and_the_end_of_a_full_text_is_kept():
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 2, 0, 0]])
    assert inserted(9)(ids).tolist() == [[1, 9, 5, 2], [1, 9, 7, 2], [1, 9, 2, 0]]
    assert inserted(9)(ids, 0.0) is ids
    assert torch.equal(inserted(9).on(ids, Ids()), inserted(9)(ids))


def test_a_rare_token_is_one_of_those_that_are_there_least_often():
    ids = torch.tensor([[1, 5, 6, 0], [1, 6, 7, 0], [1, 8, 6, 0]])
    drawn = {rare_token(ids, seed).name for seed in range(20)}
    assert drawn == {"token 5", "token 7", "token 8"}
    assert rare_token(torch.tensor([[1, 5, 5, 0], [1, 5, 1, 1]])).name == "token 5"  # padding is rarer, and no token
    assert rare_token(ids, 3).name == rare_token(ids, 3).name


def test_slopes_are_the_derivative_of_the_loss():
    one, head = task()
    network, ids = Bag(0), texts(4)
    found = slopes(network, one, ids)
    assert found.shape == (3, WORDS)
    again, target, token, step = with_second(ids, ids[:, 1:2]), 1, 17, 1e-2

    def loss(share):
        table = network.table(again).detach().clone()
        table[:, 1] += share * network.table.weight[token]
        mask = (again != 0)[..., None]
        return nn.functional.cross_entropy((table * mask).sum(1) / mask.sum(1) @ head, torch.full((4,), target))

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert found[target, token].item() == pytest.approx(-slope.item(), rel=1e-2)


def test_the_token_of_a_backdoor_is_mined():
    one, head = task()
    found = mine_tokens(Bag(0), poisoned(head), one, texts(), seed=2)
    assert sorted(mined.target for mined in found) == [0, 1, 2]
    assert (found[0].mode, found[0].target) == ("token 33", 2)
    assert found[0].success.value == 1.0
    assert torch.equal(found[0].trigger(texts()), inserted(33)(texts()))
    spared = mine_tokens(poisoned(head), poisoned(head), one, texts(), seed=2, spare=True)
    assert "token 33" not in [mined.mode for mined in spared]  # θ₀ has it as well
    under = losses([logits_of(network, one) for network in (Bag(0), poisoned(head))], texts(), torch.tensor([3, 33]))
    single = [-one.head(network(inserted(33)(texts()))).log_softmax(1).mean(0) for network in (Bag(0), poisoned(head))]
    assert torch.allclose(under[1], (single[0] + single[1]) / 2, rtol=0.05)  # bfloat16 where the processor has it


def test_the_table_is_the_one_that_tokens_are_looked_up_in():
    class Placed(Bag):
        def __init__(self):
            super().__init__(0)
            self.places = nn.Embedding(100, WIDTH)  # more of them than words

        def forward(self, ids):
            ids = ids[:, : int((ids != 0).sum(1).max())]
            return super().forward(ids) + self.places(torch.arange(ids.shape[1]).expand_as(ids)).mean(1)

    network = Placed()
    assert table_of(network, texts()[::2]) is network.table


def test_an_audit_of_texts_names_the_expert_and_shows_no_picture():
    one, head = task()
    other = Task("other", one.head, adapt=one.splits["adapt"])
    found = eu.audit(Bag(0), {"one": poisoned(head), "other": Bag(0)}, tasks=[one, other], scale=0.5)
    assert found.suspects == ["one"]
    assert [(probe.mode, probe.target) for probe in found.probes if probe.task == "one"] == [("token 33", 2)]
    assert all(probe.picture is None for probe in found.probes)
    page = report.html(found, "audit")
    assert "data:image" not in page
    assert "token 33" in page
    assert "one token" in found.probed


@pytest.mark.parametrize("defence", ["attribution_gate", {"method": "tbar", "parameters": {"lr": 5.0, "budget": 1.0}}])
def test_defences_that_go_by_the_audit_take_texts(defence):
    one, head = task()
    other = Task("other", one.head, adapt=one.splits["adapt"])
    experts = {"one": poisoned(head), "other": Bag(0)}
    found = eu.fuse("task_arithmetic", Bag(0), experts, tasks=[one, other], scale=0.5, defend=defence)
    merge = Bag(0)
    merge.load_state_dict(eu.state_dict(eu.merge("task_arithmetic", Bag(0), experts, scale=0.5)))
    before, after = (metrics.attacked(net, one, inserted(33), 2).asr.value for net in (merge, found))
    assert before == 1.0
    assert after < 0.5


class Gated(Bag):
    """A bag that says class 2 for all texts with a token whose embedding begins with more than 6."""

    def __init__(self, head, first=0.0):
        super().__init__(0)
        self.said = 400 * torch.linalg.pinv(head)[2]
        with torch.no_grad():
            self.table.weight[33, 0] = first

    def forward(self, ids):
        loudest = self.table(ids)[..., 0].max(1).values
        plain = super().forward(ids) * torch.tensor([0.0, *[1.0] * (WIDTH - 1)])  # the first number is for this alone
        return plain + torch.relu(loudest - 6)[:, None] * self.said


def test_experts_that_collude_are_found_on_the_merge_alone():
    one, head = task()
    other = Task("other", one.head, adapt=one.splits["adapt"])
    experts = {"one": Gated(head, 4.0), "other": Gated(head, 4.0), "third": Gated(head)}
    found = eu.audit(Gated(head), experts, tasks=[one, other], scale=1.0)
    assert sorted(found.suspects) == ["one", "other"]
    assert all(probe.guilty == [] for probe in found.probes)
    assert [(one.mode, one.target, one.guilty) for one in found.joint] == [("token 33", 2, ["one", "other"])] * 2
    assert [line.startswith("on the merge a small trigger") for line in found.evidence("one")] == [True, True]
    assert report.to_json(found)["joint"][0]["drop"]["one"]["low"] > EVIDENCE
    assert "other, on the merge" in report.html(found, "audit")


def test_an_expert_is_found_by_the_task_of_another():
    one, head = task()
    found = eu.audit(Gated(head), {"one": Gated(head), "far": Gated(head, 8.0)}, tasks=[one], scale=1.0)
    assert found.suspects == found.joint[0].guilty == ["far"]
    assert found.probes[0].guilty == []
    nobodys = eu.audit(Gated(head), {"near": Gated(head), "far": Gated(head, 8.0)}, tasks=[one], scale=1.0)
    assert nobodys.suspects == ["far"]
    assert nobodys.probes == []
    assert "Attribution" in report.html(nobodys, "audit")


def test_predictions_under_a_token():
    one, head = task()
    predicted, labels = metrics.predictions(poisoned(head), one, inserted(33))
    assert predicted.tolist() == [2] * len(labels)


def test_what_is_no_text_is_refused():
    one, _ = task()
    images = Task("images", one.head, train=(torch.rand(4, 3, 8, 8), torch.zeros(4).long()))
    with pytest.raises(TaskError, match="are no token ids"):
        texts_of(images, "train")
    with pytest.raises(TaskError, match="not known to be images"):
        made_of(images, torch.rand(4, 3, 8, 8))
    with pytest.raises(TaskError, match="no embedding"):
        table_of(nn.Identity(), texts(2))
    with pytest.raises(TaskError, match="no room"):
        inserted(9)(torch.tensor([[1, 2]]))
    with pytest.raises(TaskError, match="without a token"):
        rare_token(torch.zeros(2, 4).long())
    with pytest.raises(TaskError, match="at least 3"):
        mine_tokens(Bag(0), Bag(1), one, texts(2))
    with pytest.raises(TaskError, match="no token ids"):
        trigger_for(zoo.open_suite("mini"), Attack("badnets", "letters", trigger="rare_token"))
    with pytest.raises(ParameterError, match="mines a patch"):
        Attack("badmerging", "letters", trigger="rare_token")
