"""Tasks, scores, records and their intervals."""

import math

import pytest
import torch
from torch import nn

from eutectic import record
from eutectic.errors import EutecticError, TaskError
from eutectic.task import Arrays, Task

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 1, 0, 1, 0, 1])


class Backbone(nn.Module):
    def forward(self, x):
        return x


def first_class(features):
    return torch.stack([torch.ones(len(features)), torch.zeros(len(features))], dim=1)


def test_a_split_may_be_arrays_a_pair_or_a_loader():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    for split in (Arrays(X, Y), (X, Y), loader, [(X[:4], Y[:4]), (X[4:], Y[4:])]):
        task = Task("t", first_class, test=split)
        assert task.score(Backbone()) == task.score(Backbone(), batch_size=2)
        assert task.score(Backbone())[0] == 0.5


def test_score_is_accuracy_with_wilsons_interval_and_restores_the_mode():
    network = Backbone().train()
    score = Task("t", first_class, test=(X, torch.tensor([0, 0, 0, 0, 0, 1]))).score(network)
    assert score.value == 5 / 6
    assert score.n == 6
    assert network.training
    assert score[1:3] == record.wilson(5, 6)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ((X, Y[:5]), "6 inputs against labels"),
        ((X, Y.float()), "float32"),
        ((X, Y, Y), "pair of tensors"),
        (iter([(X, Y)]), "only once"),
    ],
)
def test_splits_that_cannot_be_scored_are_refused_by_name(split, words):
    with pytest.raises(TaskError, match=words):
        Task("t", first_class, test=split)


def test_missing_split_empty_split_and_labels_beyond_the_head_are_named():
    task = Task("shapes", first_class, test=(X[:0], Y[:0]), val=(X, Y + 1))
    with pytest.raises(TaskError, match=r"shapes.*no split 'adapt'.*val, test"):
        task.score(Backbone(), "adapt")
    with pytest.raises(TaskError, match=r"shapes.*'test' is empty"):
        task.score(Backbone())
    with pytest.raises(TaskError, match=r"shapes.*'val'.*do not fit labels"):
        task.score(Backbone(), "val")
    broken = Task("t", lambda features: first_class(features) * float("nan"), test=(X, Y))
    with pytest.raises(TaskError, match="not finite"):
        broken.score(Backbone())
    with pytest.raises(TaskError, match="stream"):
        Task("t", first_class, adapt=[(X, Y)]).arrays("adapt")


def test_wilson_agrees_with_the_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert record.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def some(task, hits, n, **fields):
    low, high = record.wilson(hits, n)
    return record.Record("s", "m", task, "accuracy", hits / n, low, high, n, **fields)


def test_mean_of_combines_independent_intervals():
    a, b = some("a", 80, 100, wall_s=1.0, peak_rss_bytes=5), some("b", 40, 100, wall_s=2.0, peak_rss_bytes=3)
    mean = record.mean_of([a, b])
    assert (mean.task, mean.value, mean.n, mean.wall_s, mean.peak_rss_bytes) == ("mean", pytest.approx(0.6), 200, 3.0, 5)
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2) / 2
    assert (mean.low, mean.high) == pytest.approx((0.6 - half, 0.6 + half))


def test_records_survive_a_file_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    records = [some("ä|b", 3, 9, parameters={"scale": 0.3}, inputs={"base": "00"}), some("c", 1, 2)]
    record.append(path, records[:1])
    record.append(path, records[1:])
    assert list(record.load(path)) == records
    path.write_text(path.read_text() + '{"suite": 1}\n')
    with pytest.raises(EutecticError, match=r"records\.jsonl, line 3"):
        list(record.load(path))
