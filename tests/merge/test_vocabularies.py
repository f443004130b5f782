"""Models of several vocabularies in one merge: brought to one or refused, in either schema, and what the output says."""

from __future__ import annotations

import json

import pytest
import torch

import eutectic as eu
from eutectic.checkpoint import tokenizer as tokenizer_files
from eutectic.checkpoint.base import Memory
from eutectic.checkpoint.chat import CHAT_TEMPLATES, read_chat_template
from eutectic.checkpoint.save import save_tensors
from eutectic.checkpoint.tokenizer import read_vocabulary
from eutectic.errors import CheckpointError, LayoutError, RecipeError
from eutectic.merge.mergekit import parse_mergekit
from eutectic.merge.recipe import parse
from eutectic.merge.run import _key, merged_from, save, verify

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c"]
#: name → tokens after the words, rows of the embedding, chat template
MODELS = {
    "base": (["<|x|>", "<|base|>"], 10, None),
    "chat": (["<|im_start|>", "<|im_end|>", "<|x|>"], 9, "chat {{ messages }}"),
    "tool": (["<|x|>", "<|tool|>"], 8, "tool {{ messages }}"),
    "twin": (["<|x|>", "<|base|>"], 10, "chat {{ messages }}"),
    "other": (["<|y|>", "<|base|>"], 10, None),
}


def write_tokenizer(folder, added, template=None, **config):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token) for token in added])
    made.save(str(folder / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of Llamas whose tokenizers differ, and their state dicts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root, states = tmp_path_factory.mktemp("zoo"), {}
    for seed, (name, (added, rows, template)) in enumerate(MODELS.items()):
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
            eos_token_id=7 if name == "chat" else 2,
        )
        torch.manual_seed(seed)
        states[name] = {key: tensor.clone() for key, tensor in LlamaForCausalLM(config).state_dict().items()}
        write_tokenizer(root / name, added, template)
        save_tensors(Memory(states[name]), root / name)
        about = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        (root / name / "config.json").write_text(json.dumps(about, default=str))
    return root, states


@pytest.fixture
def opened(zoo):
    """A function that opens a recipe in either schema beside the models."""
    held = []

    def open_recipe(text, compat=False):
        recipe = parse_mergekit(text, "mk.yaml", compat) if "merge_method" in text else parse(text, "r.yaml")
        held.append(merged_from(recipe, zoo[0]))
        return held[-1]

    yield open_recipe
    for merged in held:
        merged.close()


def linear(*models, more="", base="base"):
    listed = ", ".join(f"{{model: {name}, parameters: {{weight: 1}}}}" for name in models)
    return f"merge_method: linear\nbase_model: {base}\nmodels: [{listed}]\n{more}"


def loaded(out):
    """The model and tokenizer of a folder as transformers sees them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model, AutoTokenizer.from_pretrained(out)


# ── one vocabulary ────────────────────────────────────────────────────────────────────────────────────────────────────

UNION = linear("base", "chat", more="tokenizer_source: union\nchat_template: auto")
NATIVE = "method: average\nbase: base\nexperts: {chat: chat}\ntokenizer: {source: union}\nchat_template: auto"


def test_a_union_loads_in_transformers_with_the_rows_of_its_tokens(opened, zoo, tmp_path):
    composed, states = opened(UNION), zoo[1]
    out = save(composed, tmp_path / "out", recipe=parse_mergekit(UNION))
    model, words = loaded(out)
    # the base's ids stay; <|im_start|> and <|im_end|> get the next, which were padding in the base
    wanted = {token: i for i, token in enumerate([*WORDS, "<|x|>", "<|base|>", "<|im_start|>", "<|im_end|>"])}
    assert words.get_vocab() == wanted
    assert model.config.vocab_size == 10
    assert words.encode("a <|im_end|> <|x|>") == [3, 9, 6]
    base, chat = states["base"], states["chat"]
    found = model.state_dict()
    for name in (EMBED, HEAD):
        pairs = {  # new row → rows of both
            3: (base[name][3], chat[name][3]),
            6: (base[name][6], chat[name][8]),
            7: (base[name][7], base[name][7]),  # chat lacks it, so it has the base's
            8: (chat[name][6], chat[name][6]),
            9: (chat[name][7], chat[name][7]),
        }
        for row, (left, right) in pairs.items():
            torch.testing.assert_close(found[name][row], (left + right) / 2)
    torch.testing.assert_close(found[Q], (base[Q] + chat[Q]) / 2)
    assert read_chat_template(out) == "chat {{ messages }}" == words.chat_template
    assert verify(out) == []


def test_the_native_schema_says_the_same(opened, zoo, tmp_path):
    text = NATIVE.replace("average", "task_arithmetic").replace("chat: chat", "chat: chat, twin: twin")
    recipe = parse(text)
    out = save(opened(text), tmp_path / "out", recipe=recipe)
    model, words = loaded(out)
    assert dict(read_vocabulary(out).tokens) == words.get_vocab()
    assert (model.config.vocab_size, len(words)) == (10, 10)
    assert words.chat_template == "chat {{ messages }}"
    about = json.loads((out / "eutectic.json").read_text())
    assert about["recipe"]["tokenizer"] == {"source": "union", "tokens": {}, "pad_to_multiple_of": None}
    assert list(about["inputs"]) == ["base", "chat", "twin"]
    assert all(source["blake3"] for source in about["inputs"].values())
    assert parse(recipe.to_yaml()).sha256() == recipe.sha256() != parse(text.replace("union", "base")).sha256()
    rules = "tokens: {<|x|>: {source: {kind: zero}, force: true}}, pad_to_multiple_of: 16"
    ruled = opened(text.replace("{source: union}", f"{{source: chat, {rules}}}"))
    assert ruled.specs[EMBED].shape == (16, 8)
    assert not ruled.read(EMBED)[8].any()
    for wrong, what in [
        (text.replace("union", "chatt"), "'chatt' is no model of this merge. Did you mean 'chat'"),
        (text.replace("source: union", "sorce: union"), "r.yaml:4: tokenizer.sorce"),
        (text.replace("twin: twin", "base: twin"), "r.yaml:1: the recipe: with a .* `base` means the base"),
        ("method: average\nbase: base\nexperts: {base: twin}\nchat_template: auto", "`base` means the base"),
        (text.replace("base: base", "suite: mini"), "a suite has no tokenizer"),
    ]:
        with pytest.raises(RecipeError, match=what):
            opened(wrong)


def test_a_recipe_without_a_tokenizer_keeps_its_hash():
    text = "method: average\nexperts: [a, b]"
    assert "tokenizer" not in parse(text).canonical_json()
    assert "chat_template" not in parse(text).canonical_json()


@pytest.mark.parametrize(
    ("source", "tokens", "rows", "eos"),
    [("base", ["<|x|>", "<|base|>"], 10, 2), ("chat", ["<|im_start|>", "<|im_end|>", "<|x|>"], 9, 7)],
)
def test_the_vocabulary_of_one_model(opened, zoo, tmp_path, source, tokens, rows, eos):
    text = linear("base", "chat", "tool", more=f"tokenizer: {{source: {source}}}")
    out = save(opened(text), tmp_path / "out", recipe=parse_mergekit(text))
    model, words = loaded(out)
    assert words.get_vocab() == {token: i for i, token in enumerate([*WORDS, *tokens])}
    assert (model.config.vocab_size, model.config.eos_token_id) == (rows, eos)
    assert (out / "tokenizer.json").read_bytes() == (zoo[0] / source / "tokenizer.json").read_bytes()
    # its chat template comes with its files
    assert read_chat_template(out) == MODELS[source][2]


def test_rules_padding_and_mergekits_length(opened, zoo):
    rules = (
        "tokenizer:\n  source: union\n  tokens:\n"
        "    <|x|>: {source: chat, force: true}\n    a: {source: {kind: zero}, force: true}\n"
        "    <|new|>: {source: {kind: model_token, model: tool, token: <|tool|>}}\n"
    )
    composed, states = opened(linear("base", "chat", "tool", more=rules)), zoo[1]
    assert composed.specs[EMBED].shape == (12, 8)
    assert list(composed.tokenizer.vocabulary.tokens)[-2:] == ["<|tool|>", "<|new|>"]
    found = composed.read(EMBED)
    torch.testing.assert_close(found[6], states["chat"][EMBED][8])
    assert not found[3].any()
    torch.testing.assert_close(found[11], states["tool"][EMBED][7])
    assert (
        opened(linear("base", "chat", more=rules.replace("tool", "chat").replace("<|chat|>", "a"))).specs[EMBED].shape[0] == 11
    )
    padded = linear("base", "twin", more="tokenizer: {source: base, pad_to_multiple_of: 64}")
    assert opened(padded).specs[HEAD].shape == opened(padded, compat=True).specs[HEAD].shape == (64, 8)
    plain = linear("base", "twin", more="tokenizer_source: base")
    assert (opened(plain).specs[HEAD].shape[0], opened(plain, compat=True).specs[HEAD].shape[0]) == (10, 8)


def test_an_output_can_be_aligned_again(opened, zoo, tmp_path):
    stream = f"name: inner\n{linear('base', 'chat', more='tokenizer_source: union')}\n---\n" + linear(
        "inner", "tool", base="inner", more="tokenizer: {source: union}"
    )
    out = save(opened(stream), tmp_path / "out", recipe=parse_mergekit(stream))
    model, words = loaded(out)
    tokens = [*WORDS, "<|x|>", "<|base|>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
    assert words.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert model.config.vocab_size == 11
    assert "<|tool|>" in json.loads((out / "tokenizer.json").read_text())["added_tokens"][-1]["content"]
    torch.testing.assert_close(model.state_dict()[EMBED][10], zoo[1]["tool"][EMBED][7])
    # and carried through a document that says nothing, if all agree
    kept = stream.replace("\ntokenizer: {source: union}", "").replace("model: tool", "model: inner")
    assert loaded(save(opened(kept), tmp_path / "kept"))[1].get_vocab() == {t: i for i, t in enumerate(tokens[:-1])}
    with pytest.raises(LayoutError, match="the vocabularies of inner and base differ in 2"):
        opened(kept.replace("{model: inner", "{model: base, parameters: {weight: 1}}, {model: inner", 1))


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("auto", "chat {{ messages }}"),
        ("chatml", CHAT_TEMPLATES["chatml"]),
        ("'{{ messages[0].content }}'", "{{ messages[0].content }}"),
    ],
)
def test_chat_templates_need_no_tokenizer_rule(opened, tmp_path, choice, wanted):
    text = linear("base", "twin", more=f"chat_template: {choice}")
    assert read_chat_template(save(opened(text), tmp_path / "out", recipe=parse_mergekit(text))) == wanted
    native = f"method: average\nbase: base\nexperts: [twin]\nchat_template: {choice}"
    assert read_chat_template(save(opened(native), tmp_path / "native", recipe=parse(native))) == wanted


def test_no_template_is_found_and_a_wrong_one_refused(opened):
    assert any("no model has a chat template" in note for note in opened(linear("base", more="chat_template: auto")).notes)
    with pytest.raises(RecipeError, match=r"mk.yaml:4: chat_template: .*no Jinja template"):
        opened(linear("base", "twin", more="chat_template: '{% for m in messages %}{{ m }}'"))


def test_wrong_rules_have_a_line(opened):
    for more, what in [
        ("tokenizer_source: chatt", "mk.yaml:4: tokenizer: the source 'chatt' is no model"),
        ("dtype: float32\ntokenizer: {source: base, tokens: {q: {source: chat}}}", "mk.yaml:5: tokenizer: tokens: 'q'"),
    ]:
        with pytest.raises(RecipeError, match=what):
            opened(linear("base", "chat", more=more))


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DIFFER = "differ in 2 token.s., such as '<|[xy]|>'.*tokenizer: {source: union}"
DIFFERENT = [
    linear("base", "twin", "other"),
    linear("twin", "other").replace("linear", "task_arithmetic"),
    "merge_method: passthrough\nslices: [{sources: [{model: base, layer_range: [0, 1]}]}, "
    "{sources: [{model: other, layer_range: [1, 2]}]}]",
    linear("other"),  # the base gives config and tokenizer
    "method: average\nexperts: {twin: twin, other: other}",
    "method: task_arithmetic\nbase: base\nexperts: [twin, other]",
    "method: average\nexperts: {twin: twin, other: other}\nchat_template: auto",
]


@pytest.mark.parametrize("text", DIFFERENT)
def test_different_vocabularies_are_refused_before_a_tensor_is_read(opened, text, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("eutectic.checkpoint.safetensors.SafetensorsFile._read", forbidden)
    with pytest.raises(LayoutError, match=DIFFER) as caught:
        opened(text)
    assert str(caught.value).startswith("mk.yaml:1: ") == ("merge_method" in text)


@pytest.mark.parametrize("text", [linear("base", "chat"), "method: average\nbase: base\nexperts: [chat]"])
def test_where_shapes_differ_a_tokenizer_rule_is_advised(opened, text):
    with pytest.raises(LayoutError, match=r"lm_head.weight: .*\n.*\n?.*give a tokenizer rule"):
        opened(text)


def test_layers_between_may_come_from_any_model(opened):
    pieces = [("base", 0, 1), ("other", 0, 2), ("twin", 1, 2)]
    listed = ", ".join(f"{{sources: [{{model: {name}, layer_range: [{a}, {b}]}}]}}" for name, a, b in pieces)
    assert opened(f"merge_method: passthrough\nslices: [{listed}]").specs[EMBED].shape == (10, 8)


def test_the_cheap_ways_to_be_sure(opened, zoo, tmp_path, monkeypatch):
    parsed = []
    genuine = tokenizer_files.read_json
    monkeypatch.setattr(tokenizer_files, "read_json", lambda path: parsed.append(path.name) or genuine(path))
    opened(linear("base", "twin"))  # equal files, and only the small one is looked into
    assert set(parsed) == {"tokenizer_config.json"}
    # other bytes, same tokens
    path = zoo[0] / "twin" / "tokenizer.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"truncation": None}, indent=1))
    opened(linear("base", "twin"))
    assert "tokenizer.json" in parsed
    # another token in tokenizer_config.json alone
    path.write_text(before)
    config = zoo[0] / "twin" / "tokenizer_config.json"
    said = config.read_text()
    config.write_text(json.dumps(json.loads(said) | {"added_tokens_decoder": {"8": {"content": "<|q|>"}}}))
    with pytest.raises(LayoutError, match=r"'<\|q\|>': base lacks it, twin has id 8"):
        opened(linear("base", "twin"))
    config.write_text(said)


def test_models_without_tokenizer_files(opened, zoo, tmp_path):
    bare = zoo[0] / "bare"
    bare.mkdir()
    save_tensors(Memory(zoo[1]["twin"]), bare)
    opened(linear("base", "bare"))
    longer = {name: torch.nn.functional.pad(zoo[1]["twin"][name], (0, 0, 0, 2), value=1.0) for name in (EMBED, HEAD)}
    (zoo[0] / "longer").mkdir()
    save_tensors(Memory(zoo[1]["twin"] | longer), zoo[0] / "longer")
    composed = opened(linear("base", "bare", more="tokenizer_source: union"))
    assert any("bare has no tokenizer files" in note for note in composed.notes)
    assert composed.specs[EMBED].shape == (10, 8)
    padded = opened(linear("base", "longer", more="tokenizer: {pad_to_multiple_of: 12}")).read(EMBED)
    torch.testing.assert_close(padded[11], (zoo[1]["base"][EMBED][:8].mean(0) + 1) / 2)  # its own padding stays
    (bare / "tokenizer.model").write_text("x")
    opened(linear("base", "bare"))
    with pytest.raises(CheckpointError, match=r"mk.yaml:4: .*only tokenizer.model, which is not read"):
        opened(linear("base", "bare", more="tokenizer_source: union"))
    (bare / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        opened(linear("bare", base="bare", more="tokenizer_source: union"))


def test_tensors_that_are_no_embeddings_have_no_vocabulary(opened, zoo):
    for name in ("v1", "v2"):
        (zoo[0] / name).mkdir()
        save_tensors(Memory({"patch_embed.proj.weight": torch.ones(2, 3)}), zoo[0] / name)
        (zoo[0] / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    opened("method: average\nexperts: [v1, v2]")
    opened(linear("v1", "v2", base="v1"))


# ── adapters, resumption, the command line ────────────────────────────────────────────────────────────────────────────


def test_an_adapters_own_tokenizer_wins(opened, zoo, tmp_path):
    folder = zoo[0] / "lora"
    folder.mkdir()
    key = f"base_model.model.{Q.removesuffix('.weight')}"
    save_tensors(Memory({f"{key}.lora_A.weight": torch.ones(1, 8), f"{key}.lora_B.weight": torch.ones(8, 1)}), folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "../base"})
    )
    opened(linear("base", "base+lora"))  # it has the base's
    write_tokenizer(folder, [*MODELS["base"][0], "<|pad|>"], "lora {{ messages }}")
    with pytest.raises(LayoutError, match=r"base lacks it, base\+lora has id 8"):
        opened(linear("base", "base+lora"))
    text = linear("base", "base+lora", more="tokenizer: {source: base+lora}\nchat_template: auto")
    model, words = loaded(save(opened(text), tmp_path / "out", recipe=parse_mergekit(text)))
    assert words.get_vocab()["<|pad|>"] == 8
    assert (model.config.vocab_size, words.chat_template) == (10, "lora {{ messages }}")
    # alone it brings its tokenizer too
    for name, alone in (("mk", linear("base+lora", base="base+lora")), ("native", "method: average\nexperts: [lora]")):
        assert loaded(save(opened(alone), tmp_path / name))[1].get_vocab()["<|pad|>"] == 8


def test_another_tokenizer_is_another_merge(opened, zoo):
    recipe = parse_mergekit(UNION)
    path = zoo[0] / "chat" / "tokenizer.json"
    before, key = path.read_text(), _key(opened(UNION), recipe, 1)
    assert _key(opened(UNION), recipe, 1) == key
    path.write_text(before.replace("<|im_end|>", "<|the_end|>"))
    assert _key(opened(UNION), recipe, 1) != key
    path.write_text(before)


def test_the_command_line_applies_it(run, zoo, tmp_path):
    for name, text in (("mk", UNION), ("native", NATIVE)):
        path = zoo[0] / f"{name}.yaml"
        path.write_text(text)
        status, out, err = run("plan", path)
        assert status == 0, err
        assert "not applied" not in err
        status, out, err = run("merge", path, tmp_path / name)
        assert (status, out.startswith(f"{tmp_path / name}: ")) == (0, True), err
        assert eu.open(tmp_path / name).specs[EMBED].shape == (10, 8)
    words = zoo[0] / "tool" / "tokenizer.json"
    before = words.read_text()
    said = json.loads(before)
    said["model"]["vocab"]["word"] = 8
    words.write_text(json.dumps(said))
    for name, text in (("mk", UNION.replace("chat,", "tool,")), ("native", NATIVE.replace("chat: chat", "t: tool"))):
        (zoo[0] / f"{name}.yaml").write_text(text)
        assert "ordinary tokens of other models" in run("plan", zoo[0] / f"{name}.yaml")[2]
    words.write_text(before)
