"""Vocabularies, their alignment row by row against a naive one, and tokenizer files that transformers loads."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.checkpoint import tokenizer as tokenizer_files
from eutectic.checkpoint.aligned import Aligned, aligned
from eutectic.checkpoint.alignment import plan_alignment, write_tokenizer
from eutectic.checkpoint.base import Checkpoint, Memory
from eutectic.checkpoint.chat import CHAT_TEMPLATES, choose_chat_template, read_chat_template, write_chat_template
from eutectic.checkpoint.tokenizer import (
    MAX_IDS,
    Vocabulary,
    copy_tokenizer_files,
    has_tokenizer,
    read_vocabulary,
    require_same_vocabulary,
    update_configs,
)
from eutectic.errors import CheckpointError, LayoutError, OutputError, RecipeError

IN, OUT = "model.embed_tokens.weight", "lm_head.weight"


def vocabulary(text, rows=None, **added):
    return Vocabulary({token: i for i, token in enumerate(text.split())}, added, rows)


def embedding(rows, width=3, seed=0, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    return Memory({IN: torch.randn(rows, width).to(dtype), "norm.weight": torch.randn(width), **more}, f"model-{seed}")


class Counting(Checkpoint):
    """Notes what is read."""

    def __init__(self, below):
        self.below, self.reads, self.origin = below, [], below.origin

    @property
    def specs(self):
        return self.below.specs

    def _read(self, name, start, stop):
        self.reads.append((name, start, stop))
        return self.below.read_flat(name, start, stop)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def fast(vocab, added=(), kind="BPE"):
    return {"model": {"type": kind, "vocab": vocab}, "added_tokens": list(added)}


def added_token(token, at, special=True):
    return {"id": at, "content": token, "special": special, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": fast({"a": 0, "b": 1}, [added_token("<x>", 2)])},
        {"tokenizer__json": fast([["a", 0.0], ["b", -1.5], ["<x>", 0]], [added_token("<x>", 2)], "Unigram")},
        {"vocab__json": {"a": 0, "b": 1}, "merges__txt": "", "added_tokens__json": {"<x>": 2}},
        {"vocab__txt": "a\nb\n", "tokenizer_config__json": {"added_tokens_decoder": {"2": {"content": "<x>"}}}},
        {"vocab__txt": "a\r\nb\r\n<x>", "added_tokens__json": {"<x>": 2}},
    ],
)
def test_reads_every_format(tmp_path, files):
    assert not has_tokenizer(tmp_path)
    found = read_vocabulary(write(tmp_path, **files))
    assert has_tokenizer(tmp_path)
    assert dict(found.tokens) == {"a": 0, "b": 1, "<x>": 2}
    assert list(found.added) == ["<x>"]
    assert (found.size, found.reach, found.rows) == (3, 3, None)


@pytest.mark.parametrize(
    ("config", "rows", "reach"),
    [({"vocab_size": 8}, 8, 2), ({"text_config": {"vocab_size": 1}}, 1, 1), ({"vision_config": {"vocab_size": 9}}, None, 2)],
)
def test_the_config_says_how_many_rows_there_are(tmp_path, config, rows, reach):
    found = read_vocabulary(write(tmp_path, vocab__json={"a": 0, "b": 1}, config__json=config))
    assert (found.rows, found.reach) == (rows, reach)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "holds no tokenizer.*tokenizer.json"),
        ({"tokenizer__model": "x"}, "only tokenizer.model.*Save a tokenizer.json"),
        ({"tokenizer__json": "nonsense"}, "tokenizer.json is not a JSON object"),
        ({"tokenizer__json": {"model": {}}}, "tokenizer.json: its model has no `vocab`"),
        ({"tokenizer__json": fast([["a", 0], [1, 2]])}, "token number 1 is 1, not text"),
        ({"tokenizer__json": fast([["a", 0], ["a", 0]])}, "'a' comes twice, as 0 and 1"),
        ({"tokenizer__json": fast({})}, "holds no tokens"),
        ({"tokenizer__json": fast({"a": 0}, [added_token("a", 1)])}, "gives 'a' the id 1, but elsewhere .* it is 0"),
        ({"tokenizer__json": fast({"a": 0}, [added_token("b", 0)])}, "'a' and 'b' share the id 0"),
        ({"tokenizer__json": fast({"a": 0}, ["b"])}, "not a list of mappings"),
        ({"tokenizer__json": fast({"a": 0}, [{"id": 1}])}, "content of the added token 1 is not text"),
        ({"vocab__json": {"a": 0, "b": 0}}, "'a' and 'b' share the id 0"),
        ({"vocab__json": {"a": -1}}, "the id of 'a' is -1"),
        ({"vocab__json": {"a": True}}, "the id of 'a' is True"),
        ({"vocab__json": {"a": 0.0}}, "the id of 'a' is 0.0"),
        ({"vocab__json": {"a": {"b": 0}}}, "the id of 'a' is {'b': 0}"),
        ({"vocab__json": {"a": MAX_IDS}}, f"the id of 'a' is {MAX_IDS}"),
        ({"vocab__json": '{"a": 0, "a": 1}'}, "the key 'a' comes twice"),
        ({"vocab__txt": "a\nb\na\n"}, "vocab.txt: the token 'a' comes twice"),
        ({"vocab__json": {"a": 0}, "tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        (
            {"vocab__json": {"a": 0}, "tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "b"}}}},
            "id of 'b' is 'x'",
        ),
        ({"vocab__json": {"a": 0}, "added_tokens__json": {"a": 4}}, "added_tokens.json: gives 'a' the id 4"),
        ({"vocab__json": {"a": 0}, "config__json": {"vocab_size": -3}}, "-3 embedding rows"),
    ],
)
def test_refuses_what_cannot_be_trusted(tmp_path, files, what):
    with pytest.raises(CheckpointError, match=what):
        read_vocabulary(write(tmp_path, **files))


def test_refuses_links_that_leave_the_folder_and_files_beyond_the_bound(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    write(tmp_path, vocab__json={"a": 0})
    (tmp_path / "model" / "vocab.json").symlink_to(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_vocabulary(tmp_path / "model")
    (tmp_path / "model" / "vocab.json").unlink()
    (tmp_path / "model" / "vocab.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        read_vocabulary(tmp_path / "model")
    monkeypatch.setattr(tokenizer_files, "MAX_JSON_BYTES", 3)
    with pytest.raises(CheckpointError, match="4 bytes of text; at most 3"):
        read_vocabulary(tmp_path / "model")


WORDS = "model vocab added_tokens added_tokens_decoder id content a 1 text_config vocab_size eos_token_id chat_template name"
KEYS = st.sampled_from(WORDS.split())
SCALARS = st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.sampled_from(["a", "", "\ud800", 1 << 70])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
NAMES = ["tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json", "config.json", "generation_config.json"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.dictionaries(KEYS, JSON, min_size=1, max_size=6), min_size=1))
def test_whatever_is_in_the_files_the_error_is_ours(tmp_path_factory, files):
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    write(folder, **files)
    write(out, **files)
    extra = [{"id": 7, "content": "<t>"}]
    for action in (
        lambda: read_vocabulary(folder),
        lambda: read_chat_template(folder),
        lambda: copy_tokenizer_files(folder, out, extra),
        lambda: update_configs(out, 9, folder),
        lambda: write_chat_template("{{ messages }}", out),
    ):
        with contextlib.suppress(CheckpointError):
            action()


def test_different_vocabularies_need_a_rule():
    same = {"base": vocabulary("a b"), "x": vocabulary("a b", rows=64)}
    require_same_vocabulary(same)
    require_same_vocabulary({})
    with pytest.raises(LayoutError, match="base and y differ in 2 .* 'b': base has id 1, y lacks it.*source: union"):
        require_same_vocabulary({**same, "y": vocabulary("a c")})


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_union_keeps_the_bases_ids_and_appends_the_rest_in_order():
    models = {"x": vocabulary("z q a"), "base": vocabulary("a b"), "y": vocabulary("y z q")}
    plan = plan_alignment("base", models, tokens={"<new>": {"source": {"kind": "zero"}}})
    assert list(plan.tokens.items()) == [("a", 0), ("b", 1), ("z", 2), ("q", 3), ("y", 4), ("<new>", 5)]
    assert (plan.rows, plan.tokenizer, plan.models) == (6, "base", ("x", "base", "y"))
    assert [(item["content"], item["id"]) for item in plan.extra] == [("z", 2), ("q", 3), ("y", 4), ("<new>", 5)]
    assert "ordinary tokens" in plan.notes[0]
    assert "'z', 'q', 'y'" in plan.notes[0]
    assert plan_alignment(None, models).tokenizer == "x"


def test_the_flags_of_an_added_token_are_its_owners():
    models = {"base": vocabulary("a"), "x": Vocabulary({"a": 0, "<t>": 1}, {"<t>": {"special": True, "lstrip": True}})}
    plan = plan_alignment("base", models)
    wanted = {"id": 1, "content": "<t>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    assert plan.extra == ({**wanted, "special": True},)
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("source", "pad", "rows"),
    [
        ("base", None, 8),
        ("base", 1, 3),
        ("base", 4, 4),
        ("model:x", None, 2),
        ("x", 64, 64),
        ("union", None, 8),
        ("union", 1, 4),
    ],
)
def test_how_many_rows(source, pad, rows):
    models = {"base": vocabulary("a b c", rows=8), "x": vocabulary("a d")}
    assert plan_alignment("base", models, source, pad_to_multiple_of=pad).rows == rows


def test_a_union_with_new_tokens_needs_a_base_without_gaps():
    gaps = Vocabulary({"a": 0, "b": 2})
    with pytest.raises(RecipeError, match="base has ids that no token has.*source: base"):
        plan_alignment("base", {"base": gaps, "x": vocabulary("c")})
    assert plan_alignment("base", {"base": gaps, "x": vocabulary("a b")}).rows == 3
    with pytest.raises(RecipeError, match="an empty token"):
        plan_alignment(None, {"x": vocabulary("a"), "y": Vocabulary({"": 0})})


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"base": "bse"}, "the base 'bse' is none of the models. Did you mean 'base'"),
        ({"source": "bas"}, "source 'bas' is no model.* Did you mean 'base'"),
        ({"base": None, "source": "base", "models": {"x": Vocabulary({"a": 0})}}, "there is no base model"),
        ({"base": None, "models": {}}, "source 'union' is no model"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"pad_to_multiple_of": True}, "pad_to_multiple_of is True"),
        ({"pad_to_multiple_of": MAX_IDS + 1}, "at most"),
        ({"tokens": {"a": "x"}}, "'a': is 'x'; give a mapping"),
        ({"tokens": {"a": {"sources": "x"}}}, "unknown key 'sources'. Did you mean 'source'"),
        ({"tokens": {"a": {"source": "y"}}}, "'a': 'y' is no model"),
        ({"tokens": {"a": {"source": "x", "forced": True}}}, "unknown key 'forced'. Did you mean 'force'"),
        ({"tokens": {"a": {"source": "x", "force": 1}}}, "force is 1"),
        ({"tokens": {"b": {"source": "x"}}}, "x has no row for 'b'"),
        ({"tokens": {"<t>": {"source": "x"}}, "source": "base"}, "'<t>': is not in the output's vocabulary"),
        ({"tokens": {"<tt>": {"source": "x"}}, "source": "base"}, "Did you mean '<t>'"),
        ({"tokens": {"a": {"source": 3}}}, "its source is 3"),
        ({"tokens": {"a": {"source": {"kind": "one"}}}}, "its source is"),
        ({"tokens": {"a": {"source": {"kind": "zero", "model": "x"}}}}, "unknown key 'model'"),
        ({"tokens": {"a": {"source": {"kind": "model_token"}}}}, "lacks `model:`"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": {}}}}}, "{} is no model"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x"}}}}, "either a token"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x", "token": []}}}}, "either a token"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x", "token": "a", "token_id": 1}}}}, "either a token"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x", "token_id": 9}}}}, "rows of x are 0 to 2"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x", "token_id": True}}}}, "token_id is True"),
    ],
)
def test_refuses_impossible_rules(arguments, what):
    models = {"base": vocabulary("a b"), "x": Vocabulary({"a": 0, "c": 1, "<t>": 2}, {"<t>": {"special": True}})}
    with pytest.raises(RecipeError, match=what):
        plan_alignment(**{"base": "base", "models": models, **arguments})


# ── the view ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def naive_rows(name, base, models, tensors, plan, rules):
    """The definition, a row at a time: out[row], or None where a row is nobody's."""
    rows = [None] * plan.rows
    taken = set(models[name].tokens.values())
    for at in range(min(plan.rows, models[name].rows or models[name].size)):
        if at not in taken:
            rows[at] = tensors[name][at].float()

    def has(who, token):
        return token in models[who].tokens and models[who].tokens[token] < (models[who].rows or MAX_IDS)

    def row(who, token):
        return tensors[who][models[who].tokens[token]].float()

    for token, new in plan.tokens.items():
        rule = rules.get(token)
        owners = [who for who in models if has(who, token)]
        if has(name, token) and not (rule and rule.get("force")):
            rows[new] = row(name, token)
        elif rule and "source" in rule:
            source = rule["source"]
            if isinstance(source, str):
                rows[new] = row(source, token)
            elif source["kind"] == "zero":
                rows[new] = torch.zeros(tensors[name].shape[1])
            elif "token_id" in source:
                rows[new] = tensors[source["model"]][source["token_id"]].float()
            else:
                rows[new] = row(source["model"], source["token"])
        elif base in owners:
            rows[new] = row(base, token)
        elif owners:
            rows[new] = torch.stack([row(who, token) for who in owners]).mean(0)
        else:
            rows[new] = torch.zeros(tensors[name].shape[1])
    mean = tensors[name][: min(models[name].size, models[name].rows or MAX_IDS)].float().mean(0)
    return torch.stack([mean if found is None else found for found in rows])


def random_case(seed):
    draw = random.Random(seed)
    words = [f"t{i}" for i in range(14)]
    models, dtype = {}, draw.choice([torch.float32, torch.bfloat16, torch.float16])
    for name in ["base", "x", "y", "z"][: draw.randint(2, 4)]:
        chosen = draw.sample(words, draw.randint(5, 12))
        rows = len(chosen) + draw.choice([0, 0, 3, -1])
        models[name] = Vocabulary({token: i for i, token in enumerate(chosen)}, rows=draw.choice([rows, None]))
    tensors = {}
    for i, (name, found) in enumerate(models.items()):
        torch.manual_seed(100 * seed + i)
        tensors[name] = torch.randn(max(found.size, found.rows or 0), 5).to(dtype)
    first = next(iter(models))
    rules = {
        next(iter(models[first].tokens)): {"source": first, "force": True},
        draw.choice(list(models[first].tokens)): {"source": {"kind": "zero"}, "force": draw.choice([True, False])},
        draw.choice(words): {"source": {"kind": "model_token", "model": first, "token_id": 2}},
        draw.choice(words): {"force": True},
        "<new>": {"source": {"kind": "model_token", "model": first, "token": list(models[first].tokens)[1]}},
    }
    source = draw.choice(["union", "union", "base", first])
    output = {token for found in models.values() for token in found.tokens} | {"<new>"}
    rules = {t: r for t, r in rules.items() if t in (output if source == "union" else models[first].tokens)}
    base = draw.choice(["base", None]) if source != "base" else "base"
    return base, models, tensors, source, rules, draw.choice([None, 1, 8])


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_the_naive_one(seed):
    base, models, tensors, source, rules, pad = random_case(seed)
    plan = plan_alignment(base, models, source, rules, pad)
    checkpoints = {
        name: Memory({IN: tensor, OUT: -tensor, "lm_head.bias": tensor[:, 0].clone(), "w": torch.ones(2, 2)}, name)
        for name, tensor in tensors.items()
    }
    for name, view in aligned(checkpoints, plan).items():
        wanted = naive_rows(name, base, models, tensors, plan, rules)
        dtype = tensors[name].dtype
        assert {n: s.shape for n, s in view.specs.items()} == {
            IN: (plan.rows, 5),
            OUT: (plan.rows, 5),
            "lm_head.bias": (plan.rows,),
            "w": (2, 2),
        }
        for tensor, sign in ((IN, 1), (OUT, -1)):
            assert view.read(tensor).dtype == dtype
            # a mean may be rounded another way than the naive one's sum
            torch.testing.assert_close(view.read(tensor), (sign * wanted).to(dtype))
            exact = [r for r in range(plan.rows) if plan.maps[name].model[r] not in (-2, -3)]
            assert torch.equal(view.read(tensor)[exact], (sign * wanted).to(dtype)[exact])
        torch.testing.assert_close(view.read("lm_head.bias"), wanted[:, 0].to(dtype))
        assert torch.equal(view.read("w"), torch.ones(2, 2))


@pytest.mark.parametrize("seed", range(0, 60, 7))
def test_chunks_are_the_whole(seed):
    base, models, tensors, source, rules, pad = random_case(seed)
    plan = plan_alignment(base, models, source, rules, pad)
    views = aligned({name: Memory({IN: tensor}, name) for name, tensor in tensors.items()}, plan)
    for view in views.values():
        whole = view.read(IN).flatten()
        for size in (1, 3, 5, 7, 11):
            chunks = [view.read_flat(IN, at, min(at + size, len(whole))) for at in range(0, len(whole), size)]
            assert torch.equal(torch.cat(chunks), whole)
        assert torch.equal(view.read(IN, slice(1, 3)), whole.view(-1, 5)[1:3])
        assert view.read(IN, slice(2, 2)).shape == (0, 5)


def test_only_the_rows_that_are_needed_are_read():
    models = {"base": vocabulary("a b c d e f"), "x": vocabulary("f e d c b a <t>")}
    below = {"base": Counting(embedding(6)), "x": Counting(embedding(7, seed=1))}
    views = aligned(below, plan_alignment("base", models, pad_to_multiple_of=8))
    assert not below["base"].reads
    assert not below["x"].reads
    views["base"].read_flat(IN, 4, 11)  # parts of three rows that lie together: one read
    assert below["base"].reads == [(IN, 4, 11)]
    views["base"].read_flat(IN, 17, 20)  # the end of its last row, and the beginning of one that only x has
    assert below["base"].reads[1:] == [(IN, 17, 18)]
    assert below["x"].reads == [(IN, 18, 20)]
    views["x"].read_flat(IN, 0, 6)  # in the other order there: a read a row
    assert below["x"].reads[1:] == [(IN, 15, 18), (IN, 12, 15)]
    for _ in range(2):  # the mean is taken once
        views["base"].read_flat(IN, 21, 24)
    assert below["base"].reads[2:] == [(IN, 0, 18)]


def test_the_mean_row_streams(monkeypatch):
    monkeypatch.setattr("eutectic.checkpoint.aligned._BLOCK", 7)
    model = Counting(embedding(9, seed=2))
    view = Aligned("x", {"x": model}, plan_alignment(None, {"x": vocabulary("a b c d e", rows=9)}, pad_to_multiple_of=16))
    torch.testing.assert_close(view.read(IN)[10], model.below.read(IN)[:5].mean(0))
    assert max(stop - start for _, start, stop in model.reads[1:]) == 6
    assert torch.equal(view.read(IN)[:9], model.below.read(IN))  # its own padding stays


def test_same_vocabulary_changes_nothing():
    models = {"base": vocabulary("a b c", rows=5), "x": vocabulary("a b c", rows=5)}
    below = {name: embedding(5, seed=i) for i, name in enumerate(models)}
    for source in ("union", "base", "x"):
        for name, view in aligned(below, plan_alignment("base", models, source)).items():
            assert view.specs == below[name].specs
            assert torch.equal(view.read(IN), below[name].read(IN))


def test_tied_heads_stay_tied_or_absent():
    models = {"base": vocabulary("a b"), "x": vocabulary("b a c")}
    tied = embedding(2)
    shared = embedding(3, seed=1).read(IN)
    both = Memory({IN: shared, OUT: shared, "norm.weight": torch.ones(3)})
    views = aligned({"base": tied, "x": both}, plan_alignment("base", models, pad_to_multiple_of=4))
    assert OUT not in views["base"].specs
    assert torch.equal(views["x"].read(IN), views["x"].read(OUT))
    # the head of a model whose head is its embedding is its embedding
    plan = plan_alignment("base", models, tokens={"b": {"source": "base", "force": True}})
    assert torch.equal(aligned({"base": tied, "x": both}, plan)["x"].read(OUT)[1], tied.read(IN)[1])


def test_tokens_that_no_model_learnt_are_zeros_with_a_note():
    plan = plan_alignment(None, {"x": vocabulary("a b c", rows=2)})
    assert "no model has a row for 'c': zeros" in plan.notes[0]
    view = Aligned("x", {"x": embedding(2)}, plan)
    assert view.read(IN).shape == (3, 3)
    assert not view.read(IN)[2].any()


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("transformer.wte.weight", (3, 4), (5, 4)),
        ("gpt_neox.embed_in.weight", (3, 4), (5, 4)),
        ("embed_out.weight", (3, 4), (5, 4)),
        ("shared.weight", (3, 1), (5, 1)),
        ("backbone.embeddings.weight", (3, 4), (5, 4)),
        ("bert.embeddings.word_embeddings.weight", (3, 4), (5, 4)),
        ("language_model.model.embed_tokens.weight", (3, 4), (5, 4)),
        ("cls.predictions.bias", (3,), (5,)),
        ("cls.predictions.decoder.bias", (3,), (5,)),
        ("final_logits_bias", (1, 3), (1, 5)),
        ("lm_head.dense.weight", (3, 4), (3, 4)),
        ("lm_head.layer_norm.weight", (3,), (3,)),
        ("mlp.shared.weight", (3, 4), (3, 4)),
        ("embed_positions.weight", (3, 4), (3, 4)),
        ("embeddings.token_type_embeddings.weight", (3, 4), (3, 4)),
    ],
)
def test_which_tensors_are_embeddings(name, shape, wanted):
    plan = plan_alignment(None, {"x": vocabulary("a b c")}, pad_to_multiple_of=5)
    tensor = torch.randn(shape)
    view = Aligned("x", {"x": Memory({IN: torch.zeros(3, 2), name: tensor})}, plan)
    assert view.specs[name].shape == wanted
    assert view.read(name).flatten()[: tensor.numel()].tolist() == tensor.flatten().tolist()


def test_models_that_cannot_be_aligned():
    models = {"base": vocabulary("a b"), "x": vocabulary("a c")}
    plan = plan_alignment("base", models)
    good = embedding(2)
    for who, bad, what in [
        ("x", Memory({"w": torch.ones(2, 2)}, "bad"), "bad: no tensor has the name of an embedding"),
        ("x", embedding(1), r"has no row for id 1 of its vocabulary"),
        ("x", embedding(2, width=4, seed=5), r"other rows than"),
        ("x", Memory({IN: torch.zeros(2, 3, dtype=torch.int8)}, "bad"), "bad: .* is quantised"),
        ("base", Memory({OUT: torch.zeros(2, 3)}, "bad"), "bad: has no 'model.embed_tokens.weight'"),
    ]:
        with pytest.raises(LayoutError, match=what):
            Aligned(who, {"base": good, "x": bad}, plan)


def test_closing_closes_its_own_model_only():
    closed = []

    class Closing(Counting):
        def close(self):
            closed.append(self.origin)

    below = {"base": Closing(embedding(2)), "x": Closing(embedding(2, seed=1))}
    aligned(below, plan_alignment("base", {"base": vocabulary("a b"), "x": vocabulary("a c")}))["x"].close()
    assert closed == ["model-1"]


def test_a_large_vocabulary_is_planned_quickly():
    big = Vocabulary({f"token {i}": i for i in range(50_000)})
    other = Vocabulary({f"token {i + 100}": i for i in range(50_000)})
    plan = plan_alignment("base", {"base": big, "x": other})
    assert plan.rows == 50_100
    assert np.array_equal(plan.maps["x"].row[100:], np.arange(50_000))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_bpe(folder, special, plain=(), template=None, **config):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "Ġ", "ab"])}
    rust = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_tokens(list(special), special_tokens=True)
    made.add_tokens(list(plain))
    made.chat_template = template
    made.save_pretrained(folder)
    write(folder, config__json={"model_type": "llama", "vocab_size": len(made), "eos_token_id": 2, **config})
    return folder


def save_wordpiece(folder, words, special):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    rust = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]", pad_token="[PAD]")
    made.add_tokens(list(special), special_tokens=True)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path):
    return {
        "base": save_bpe(tmp_path / "base", ["<|x|>"], ["plain"]),
        "chat": save_bpe(tmp_path / "chat", ["<|im_start|>", "<|x|>", "<|im_end|>"], eos_token_id=10, pad_token_id=0),
    }


@pytest.fixture
def target(tmp_path):
    """A merged model's folder with its base's side files."""
    folder = save_bpe(tmp_path / "out", ["<|x|>"], ["plain"], template="{{ messages }} of the base")
    write(folder, generation_config__json={"eos_token_id": 2, "temperature": 1.0}, added_tokens__json={"<|x|>": 8})
    return folder


def test_a_unions_tokenizer_loads_and_encodes_to_the_new_ids(folders, target):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plan = plan_alignment("base", {name: read_vocabulary(folder) for name, folder in folders.items()}, pad_to_multiple_of=16)
    assert [(item["content"], item["id"], item["special"]) for item in plan.extra] == [
        ("<|im_start|>", 10, True),
        ("<|im_end|>", 11, True),
    ]
    assert plan.notes == ()
    write_tokenizer(plan, folders, target)
    rust, fast_one = Tokenizer.from_file(str(target / "tokenizer.json")), AutoTokenizer.from_pretrained(target)
    assert rust.get_vocab() == fast_one.get_vocab() == dict(plan.tokens) == dict(read_vocabulary(target).tokens)
    text, ids = "<|im_start|>ab plain<|im_end|><|x|>", [10, 7, 6, 9, 11, 8]
    assert rust.encode(text).ids == fast_one.encode(text) == ids
    assert fast_one.decode([10, 7, 11], skip_special_tokens=True) == "ab"
    assert json.loads((target / "config.json").read_text())["vocab_size"] == 16
    assert not (target / "added_tokens.json").exists()  # which the base's own folder lacks
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    write_tokenizer(plan, folders, target)
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_union_loads_by_the_tokenizers_own_class(folders, target, kind):
    from transformers import AutoTokenizer

    decoder = {"8": {"content": "<|x|>", "special": True}, "9": {"content": "plain", "special": False}}
    write(folders["base"], tokenizer_config__json={"tokenizer_class": kind, "added_tokens_decoder": decoder, "auto_map": {}})
    write(folders["base"], added_tokens__json={"<|x|>": 8, "plain": 9})
    plan = plan_alignment("base", {name: read_vocabulary(folder) for name, folder in folders.items()})
    written = write_tokenizer(plan, folders, target)
    assert written == ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert list(config["added_tokens_decoder"]) == ["8", "9", "10", "11"]
    assert config["added_tokens_decoder"]["11"]["content"] == "<|im_end|>"
    assert "auto_map" not in config
    assert json.loads((target / "added_tokens.json").read_text())["<|im_end|>"] == 11
    loaded = AutoTokenizer.from_pretrained(target)
    found = loaded.get_vocab()  # to which some classes add tokens of their own, where they are missing
    assert {token: found[token] for token in plan.tokens} == dict(plan.tokens)
    assert loaded.encode("<|im_start|><|im_end|><|x|>", add_special_tokens=False) == [10, 11, 8]


def test_a_union_of_wordpieces(tmp_path):
    from transformers import AutoTokenizer

    folders = {
        "base": save_wordpiece(tmp_path / "base", ["cat", "##s"], ["[Q]"]),
        "x": save_wordpiece(tmp_path / "x", ["dog", "##s", "cat"], ["[A]", "[Q]"]),
    }
    (tmp_path / "out").mkdir()
    plan = plan_alignment("base", {name: read_vocabulary(folder) for name, folder in folders.items()})
    assert "'dog'" in plan.notes[0]
    write_tokenizer(plan, folders, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == dict(plan.tokens)
    assert loaded.encode("cats [A] dog [Q]", add_special_tokens=False) == [
        plan.tokens[t] for t in ("cat", "##s", "[A]", "dog", "[Q]")
    ]


def test_a_union_over_files_older_than_tokenizer_json(tmp_path):
    from transformers import AutoTokenizer

    base, x, out = (tmp_path / name for name in ("base", "x", "out"))
    for folder in (base, x, out):
        folder.mkdir()
    write(
        base, vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n", tokenizer_config__json={"tokenizer_class": "BertTokenizer"}
    )
    write(x, tokenizer__json=fast({"a": 0}, [added_token("[new]", 1)]))
    plan = plan_alignment("base", {"base": read_vocabulary(base), "x": read_vocabulary(x)})
    assert write_tokenizer(plan, {"base": base, "x": x}, out) == ["added_tokens.json", "tokenizer_config.json", "vocab.txt"]
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.encode("a [new]", add_special_tokens=False) == [5, 6]
    assert loaded.decode([5, 6], skip_special_tokens=True) == "a"
    assert dict(read_vocabulary(out).tokens) == dict(plan.tokens)


@pytest.mark.parametrize(("source", "eos", "pad"), [("base", 2, None), ("chat", 10, 0)])
def test_one_models_tokenizer_is_copied_with_its_token_ids(folders, target, source, eos, pad):
    plan = plan_alignment("base", {name: read_vocabulary(folder) for name, folder in folders.items()}, source)
    write(folders["chat"], generation_config__json={"eos_token_id": [10, 2]})
    assert write_tokenizer(plan, folders, target) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (folders[source] / name).read_bytes()
    assert not (target / "chat_template.jinja").exists()
    config = json.loads((target / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config.get("pad_token_id")) == (plan.rows, eos, pad)
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2 if source == "base" else [10, 2], "temperature": 1.0}


def test_the_size_goes_where_the_config_keeps_it(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    config = {"image_token_index": 5, "text_config": {"eos_token_id": 1}, "vision_config": {"vocab_size": 3}}
    write(source, config__json={"image_token_index": 7, "text_config": {"eos_token_id": 9, "other": 1}})
    write(target, config__json=config)
    update_configs(target, 32, source)
    assert json.loads((target / "config.json").read_text()) == {
        "image_token_index": 7,
        "text_config": {"eos_token_id": 9, "vocab_size": 32},
        "vision_config": {"vocab_size": 3},
    }


def test_copying_stays_inside_and_never_onto_itself(tmp_path, folders):
    with pytest.raises(OutputError, match="is where the tokenizer comes from"):
        copy_tokenizer_files(folders["base"], folders["base"] / ".")
    assert (folders["base"] / "tokenizer.json").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_text("x")
    (folders["base"] / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        copy_tokenizer_files(folders["base"], tmp_path / "out")


def test_two_models_of_different_vocabularies_merge_and_load(tmp_path, folders, target):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from eutectic.checkpoint.folder import open_folder
    from eutectic.checkpoint.save import save_tensors

    vocabularies = {name: read_vocabulary(folder) for name, folder in folders.items()}
    for seed, (name, found) in enumerate(vocabularies.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=found.size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folders[name])
    plan = plan_alignment("base", vocabularies, pad_to_multiple_of=8)
    views = aligned({name: open_folder(folder) for name, folder in folders.items()}, plan)
    (target / "config.json").write_bytes((folders["base"] / "config.json").read_bytes())
    save_tensors(views["chat"], target)
    write_tokenizer(plan, folders, target)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (folders["chat"], target))
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (folders["chat"], target))
    assert after.config.vocab_size == 16
    text = "<|im_start|>ab c<|x|><|im_end|>"
    with torch.no_grad():
        left = before(**old(text, return_tensors="pt", return_token_type_ids=False)).logits
        right = after(**new(text, return_tensors="pt", return_token_type_ids=False)).logits
    order = [plan.tokens[token] for token in sorted(vocabularies["chat"].tokens, key=vocabularies["chat"].tokens.get)]
    torch.testing.assert_close(right[..., order], left)  # the same model, under other ids


# ── chat templates ────────────────────────────────────────────────────────────────────────────────────────────────────

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_built_in_templates_render_as_their_models_expect(folders, name):
    from transformers import AutoTokenizer

    template = choose_chat_template(name, {})
    made = AutoTokenizer.from_pretrained(folders["base"])
    assert made.apply_chat_template(TALK, chat_template=template, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    alone = made.apply_chat_template(TALK[1:2], chat_template=template, tokenize=False)
    assert "Hi" in alone
    assert ("Below is an instruction" in alone) == (name == "alpaca")


def test_auto_is_the_most_common_and_the_bases_in_a_tie(tmp_path):
    folders = {}
    for name, config in {
        "x": "one {{ x }}",
        "base": "two",
        "y": [{"name": "default", "template": "one {{ x }}"}],
        "z": None,
    }.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        write(folders[name], tokenizer_config__json={"chat_template": config})
    assert choose_chat_template("auto", folders, "base") == "one {{ x }}"
    (folders["z"] / "chat_template.jinja").write_text("two")
    assert choose_chat_template("auto", folders, "base") == "two"
    assert choose_chat_template("auto", folders) == "one {{ x }}"
    write(folders["z"], chat_template__json={"chat_template": "unread"})
    assert read_chat_template(folders["z"]) == "two"
    assert choose_chat_template("auto", {}) is None


@pytest.mark.parametrize(
    ("choice", "what"),
    [
        ("chatmll", "Did you mean 'chatml'"),
        ("{{ too short", "neither"),
        ("{% for m in messages %}{{ m }}", "no Jinja template.*line 1"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "no Jinja template"),
        ("{{ messages }}" + " " * (1 << 20), "is longer than"),
    ],
)
def test_refuses_what_is_no_template(choice, what):
    with pytest.raises(RecipeError, match=what):
        choose_chat_template(choice, {})


def test_a_literal_template_is_parsed_and_never_rendered():
    for literal in (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
        "{{ raise_exception('not reached') }}{{ 10 ** 10 ** 10 }}",
    ):
        assert choose_chat_template(literal, {}) == literal


def test_a_template_is_written_wherever_it_is_read(target):
    from transformers import AutoTokenizer

    write(target, chat_template__json={"chat_template": "old"})
    write_chat_template("{{ messages[0].content }}!", target)
    assert read_chat_template(target) == "{{ messages[0].content }}!"
    for name in ("tokenizer_config.json", "chat_template.json"):
        assert json.loads((target / name).read_text())["chat_template"] == "{{ messages[0].content }}!"
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded.apply_chat_template(TALK, tokenize=False) == "Be brief.!"
    with pytest.raises(CheckpointError, match="surrogate"):
        write_chat_template("{{ '\ud800' }}", target)
