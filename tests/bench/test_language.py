"""Language models: texts as samples, perplexity, and the road from a base to scored fusions on a tiny random Llama."""

import dataclasses
import gzip
import json
import math

import pytest
import torch
from benchmarks import language as script

import eutectic as eu
from eutectic import record
from eutectic.bench.language import Decoder, Texts, geometric_mean, perplexity, text_losses, vocabulary
from eutectic.checkpoint.base import live
from eutectic.checkpoint.lora import Lora
from eutectic.errors import TaskError
from eutectic.tuning.lora import save_adapter
from eutectic.tuning.trainer import Training, fine_tune

START, WORDS = 0, 24
transformers = pytest.importorskip("transformers")


def llama(tied=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "intermediate_size": 48, "tie_word_embeddings": tied},
        **{"bos_token_id": START, "eos_token_id": START, "pad_token_id": None},
    )
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(n=40, seed=0, low=1, high=WORDS):
    """Texts of two to nine tokens, each mostly the one before it plus one."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        first, length = (int(torch.randint(a, b, (), generator=random)) for a, b in ((low, high), (2, 10)))
        found.append([low + (first + i - low) % (high - low) for i in range(length)])
    return found


def experts(tmp_path, tied=True):
    """LoRA folders of two halves of the vocabulary over the base in a folder, opened."""
    llama(tied).save_pretrained(tmp_path / "base")
    for seed, (name, low) in enumerate({"low": 1, "high": 12}.items()):
        model = llama(tied)
        decoder = Decoder(model)
        training = Training(steps=15, lr=1e-2, batch_size=8, rank=3, alpha=6, kind="lora", seed=seed)
        fine_tune(decoder, vocabulary(model), Texts(rows(low=low, high=low + 12), START), training)
        (tmp_path / name).mkdir()
        save_adapter(decoder, tmp_path / name, "../base", torch.float32)
    return {name: eu.open(tmp_path / name) for name in ("low", "high")}


def test_texts_are_tokens_and_their_successors_and_a_batch_is_as_long_as_its_longest():
    texts = Texts([[5, 6, 7], [8], [9, 3]], START)
    inputs, labels = texts.take(torch.tensor([2, 1]))
    assert inputs.tolist() == [[START, 9], [START, 8]]
    assert labels.tolist() == [[9, 3], [8, -100]]
    assert len(texts) == 3
    assert texts.take(torch.arange(3))[0].shape == (3, 3)
    for none in ([], [[1], []]):
        with pytest.raises(TaskError, match="without a token"):
            Texts(none, START)


def test_losses_are_those_of_each_text_alone_whatever_its_batch():
    model, tokens = llama(dtype=torch.float64), rows()
    expected = []
    for row in tokens:
        with torch.no_grad():
            logs = model(torch.tensor([[START, *row]])).logits[0].log_softmax(-1)
        expected.append(-sum(logs[i, token].item() for i, token in enumerate(row)))
    for batch_size in (1, 7, 64):
        found = text_losses(model.train(), Texts(tokens, START), batch_size)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
        assert model.training
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(TaskError, match="not finite"):
        text_losses(model, Texts(tokens, START))


def test_perplexity_and_its_interval_are_those_of_a_bootstrap_over_texts():
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (300,), generator=random)
    losses = lengths * (3 + 0.5 * torch.randn(300, generator=random, dtype=torch.float64)) + torch.randn(300, generator=random)
    value, low, high, n = perplexity(losses, lengths)
    assert n == 300
    assert value == pytest.approx(math.exp(losses.sum() / lengths.sum()))
    again = torch.randint(0, 300, (4000, 300), generator=random)
    logs = losses[again].sum(1) / lengths[again].sum(1)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * logs.std().item(), rel=0.06)
    assert perplexity(torch.full((5,), math.log(7.0)), torch.ones(5)) == pytest.approx((7, 7, 7, 5))
    mean = geometric_mean({"a": perplexity(losses, lengths), "b": perplexity(2 * losses, lengths)})
    assert mean.value == pytest.approx(value**1.5)
    assert math.log(mean.high / mean.value) == pytest.approx(math.log(high / value) * math.sqrt(5) / 2)
    with pytest.raises(TaskError, match="two texts"):
        perplexity(losses[:1], lengths[:1])


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_is_trained_and_saved_under_the_names_of_the_folder(tmp_path, tied):
    opened = experts(tmp_path, tied)
    assert all(isinstance(expert, Lora) for expert in opened.values())
    assert set(opened["low"].specs) == set(eu.open(tmp_path / "base").specs)
    assert ("lm_head.weight" in opened["low"].specs) is not tied
    changed = {
        name for name, spec in opened["low"].specs.items() if not opened["low"].read(name).equal(live(llama(tied)).read(name))
    }
    assert len(changed) == 2 * 7
    assert all(".layers." in name and name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_text_in_a_mixture_depends_on_no_batch_mate_no_padding_and_no_later_token(tmp_path, top_k):
    base, opened = llama(), experts(tmp_path)
    mixture = eu.fuse("smile", base, opened, tasks=[], rank=3, gate_rank=3, top_k=top_k)
    tokens = torch.tensor([[START, 3, 4, 5, 6, 7], [START, 20, 21, 0, 0, 0], [START, 9, 17, 2, 0, 0]])
    lengths = (6, 3, 4)
    with torch.no_grad():
        together = mixture(tokens).logits
        assert (together - base(tokens).logits).abs().max() > 0.1
        for i, length in enumerate(lengths):
            alone = mixture(tokens[i : i + 1, :length]).logits[0]
            torch.testing.assert_close(together[i, :length], alone, rtol=0, atol=1e-5)
            first = mixture(tokens[i : i + 1, :2]).logits[0]
            torch.testing.assert_close(together[i, :2], first, rtol=0, atol=1e-5)
            padded = torch.cat([torch.full((1, 2), 11), tokens[i : i + 1, :length]], dim=1)  # on the left: hidden by the mask
            mask = torch.cat([torch.zeros(1, 2), torch.ones(1, length)], dim=1).long()
            positions = torch.cat([torch.zeros(2), torch.arange(length)]).long()[None]
            hidden = mixture(padded, attention_mask=mask, position_ids=positions).logits[0, 2:]
            torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-5)


def write_texts(folder, name, low):
    lines = [json.dumps({"classes": ["all"]})]
    for split, n, seed in (("train", 150, 0), ("test", 60, 1)):
        # the two parts must differ, or texts are dropped as seen before
        for row in rows(n, seed, low, low + 12):
            lines.append(json.dumps({"split": split, "text": " ".join(f"w{i}" for i in row), "label": 0}))
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))


def write_base(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, WORDS)}, "<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<|endoftext|>").save_pretrained(folder)
    llama().save_pretrained(folder)


def test_from_a_base_to_scored_fusions(tmp_path):
    write_base(tmp_path / "source")
    for name, low in (("one", 1), ("two", 12), ("other", 6)):
        write_texts(tmp_path, name, low)
    few = script.Plan(
        **{"domains": ("one", "two"), "unseen": "other", "unseen_test": 8, "tokens": 8, "start": "<|endoftext|>"},
        sizes={"train": 60, "val": 6, "test": 20},
        training=Training(steps=2, lr=1e-2, batch_size=8, rank=3, alpha=6, kind="lora"),
    )
    more = dataclasses.replace(few, training=dataclasses.replace(few.training, steps=30))
    found = {}
    for name, plan in (("few", few), ("more", more)):
        out, said = tmp_path / name, []
        script.build(plan, out, str(tmp_path / "source"), tmp_path, said.append)
        texts = json.loads((out / "texts.json").read_text())
        for splits in texts.values():
            assert not set(splits["test"]) & (set(splits["train"]) | set(splits["val"]))
            assert not set(splits["val"]) & set(splits["train"])
        script.score(out, out / "records.jsonl", said.append)
        before = (out / "records.jsonl").read_text()
        script.score(out, out / "records.jsonl", said.append)
        assert (out / "records.jsonl").read_text() == before
        found[name] = {(r.metric, r.method, r.task): r for r in record.load(out / "records.jsonl")}
        with pytest.raises(SystemExit, match="another plan"):
            script.build(dataclasses.replace(plan, tokens=9), out, "", tmp_path)
    metric, ratio = "perplexity", "perplexity ratio to the base"
    labels = ["pretrained", "expert(one)", "expert(two)", *script.CLOSED, *script.MIXED]
    for name in found:
        own = {task: found[name].pop((m, "individual", task)) for m in (metric, ratio) for task in ("one", "two", "mean")}
        assert own["one"].value == found[name][ratio, "expert(one)", "one"].value
        assert own["mean"].value == pytest.approx(math.sqrt(own["one"].value * own["two"].value))
        assert set(own["one"].inputs) == {"base", "one"}
    for records in found.values():
        assert list(dict.fromkeys(method for _, method, _ in records)) == labels
        assert len(records) == 2 * 4 * len(labels)
        assert all(0 < r.low < r.value < r.high < math.inf or r.value == 1 for r in records.values())
        for label in labels:
            base, own, relative = (
                records[metric, "pretrained", "one"],
                records[metric, label, "one"],
                records[ratio, label, "one"],
            )
            assert relative.value == pytest.approx(own.value / base.value)
    for domain in ("one", "two"):
        base, early, late = (
            found[name][metric, label, domain].value
            for name, label in (("more", "pretrained"), ("few", f"expert({domain})"), ("more", f"expert({domain})"))
        )
        assert late < 0.5 * early < early < base
    fused = {label: found["more"][metric, label, "mean"].value for label in labels}
    assert all(fused[label] < 0.8 * fused["pretrained"] for label in (*script.CLOSED, *script.MIXED))
    assert found["more"][metric, "ties", "one"].parameters["scale"] in script.SCALES
