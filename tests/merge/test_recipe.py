"""What a recipe says, what it may not say, and that equal recipes have equal hashes."""

from __future__ import annotations

import pytest

from eutectic.errors import EutecticError, ParameterError, RecipeError, UnknownNameError
from eutectic.merge.recipe import Recipe, load, parse

FULL = """\
# a comment
method: ties
base: models/base
experts:
  cars: models/cars
  birds: models/birds
parameters:
  density: 0.3
  scale: 1.5
overrides:
  - match: "*.bias"
    parameters: {scale: 1}
dtype: bfloat16
seed: 3
"""


def test_a_full_recipe():
    recipe = parse(FULL)
    assert (recipe.method, recipe.base, recipe.dtype, recipe.seed) == ("ties", "models/base", "bfloat16", 3)
    assert list(recipe.experts.items()) == [("cars", "models/cars"), ("birds", "models/birds")]
    assert recipe.parameters == {"density": 0.3, "scale": 1.5}
    assert [(o.match, o.parameters) for o in recipe.overrides] == [("*.bias", {"scale": 1})]


def test_experts_in_a_list_are_numbered():
    assert parse("method: average\nexperts: [x, y]").experts == {"0": "x", "1": "y"}


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(FULL).method = "dare"


@pytest.mark.parametrize(
    ("text", "kind", "line", "says"),
    [
        ("metod: ties", RecipeError, 1, "'metod'. Did you mean 'method'?"),
        ("method: ties\nbase: b\nexpert: [a]", RecipeError, 3, "Did you mean 'experts'?"),
        ("method: tyes", UnknownNameError, 1, "Did you mean 'ties'?"),
        ("base: b\n\nmethod: tie", UnknownNameError, 3, "Did you mean 'ties'?"),
        ("base: b", RecipeError, 1, "method"),
        ("method: ties\nparameters:\n  scale: 1\n  densty: 0.2", ParameterError, 4, "Did you mean 'density'?"),
        ("method: ties\nparameters:\n  scale: 1\n  density: 2", ParameterError, 4, "less than or equal to 1"),
        ("method: ties\nparameters:\n  over: tensors", ParameterError, 3, "'tensor' or 'model'"),
        ("method: ties\nparameters: {scale: .nan}", ParameterError, 2, "'scale'"),
        ("method: ties\nparameters: {scale: .inf}", ParameterError, 2, "'scale'"),
        ("method: average\nparameters:\n\n  weights: [1, x]", ParameterError, 4, "weights.1"),
        ("method: ties\noverrides:\n  - match: x\n    parameters:\n      scael: 1", ParameterError, 5, "Did you mean 'scale'?"),
        ("method: ties\noverrides:\n  - match: x\n    parameter: {}", RecipeError, 3, "overrides.0.parameters"),
        ("method: ties\ndtype: float23", RecipeError, 2, "'float32'"),
        ("method: ties\nseed: -1", RecipeError, 2, "seed"),
        ("method: ties\nexperts:\n  a: x\n  b: 3", RecipeError, 4, "experts.b"),
        ("method: ties\nexperts:\n  - x\n  - [y]", RecipeError, 4, "experts.1"),
        ("method: ties\nexperts: x", RecipeError, 2, "experts"),
        ("method: ties\nexperts:", RecipeError, 2, "experts"),
        ("method: ties\nprotocol: both", RecipeError, 2, "'inductive'"),
        ("method: ties\nbase: b\nmethod: dare", RecipeError, 3, "duplicate key"),
        ("method: ties\nexperts:\n  a: x\n  a: y", RecipeError, 4, "duplicate key"),
        ("method: ties\n\tbase: b", RecipeError, 2, "not YAML"),
        ("method: [ties", RecipeError, 1, "not YAML"),
        ("method: ties\nbase: *missing", RecipeError, 2, "not YAML"),
        ("method: ties\n---\nmethod: dare", RecipeError, 2, "not YAML"),
        ("", RecipeError, 1, "mapping"),
        ("- method: ties", RecipeError, 1, "mapping"),
        ("ties", RecipeError, 1, "mapping"),
        ("method: !!python/name:os.system x", RecipeError, 1, "method"),
    ],
)
def test_errors_name_the_line(text, kind, line, says):
    with pytest.raises(kind) as caught:
        parse(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml:{line}: "), message
    assert says in message


def test_binary_is_not_yaml():
    with pytest.raises(RecipeError, match=r"my\.yaml"):
        parse("\0\1", "my.yaml")


def test_deep_nesting_is_refused_and_not_a_crash():
    with pytest.raises(RecipeError, match=r"my\.yaml"):
        parse("method: " + "[" * 600, "my.yaml")


def test_two_experts_cannot_share_a_name():
    # 1 and "1" are two keys in YAML, and one name
    with pytest.raises(RecipeError, match=r"my\.yaml:4"):
        parse("method: average\nexperts:\n  1: x\n  '1': y\n", "my.yaml")


def test_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(FULL)
    assert load(path) == parse(FULL)
    for bad, content in (("missing.yaml", None), ("latin1.yaml", "méthode".encode("latin1"))):
        if content:
            (tmp_path / bad).write_bytes(content)
        with pytest.raises(RecipeError, match=f"{bad}: cannot be read"):
            load(tmp_path / bad)
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


# ── YAML 1.2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_words_are_words_and_numbers_are_numbers():
    recipe = parse("method: dare\nbase: no\nexperts: {on: yes, off: null_, y: n}\nparameters: {scale: 1e-3, seed: 010}")
    assert recipe.base == "no"
    assert recipe.experts == {"on": "yes", "off": "null_", "y": "n"}
    assert recipe.parameters == {"scale": 0.001, "seed": 10}
    assert type(recipe.parameters["scale"]) is float
    assert type(recipe.parameters["seed"]) is int


def test_a_word_is_no_number():
    with pytest.raises(ParameterError, match="'scale' = 'no'"):
        parse("method: ties\nparameters: {scale: no}")


def test_a_path_that_looks_like_a_number_needs_quotes():
    with pytest.raises(RecipeError, match="base"):
        parse("method: ties\nbase: 2024")
    assert parse("method: ties\nbase: '2024'").base == "2024"


def test_anchors_may_be_used():
    recipe = parse("method: &m ties\nbase: &b models\nexperts: {x: *b}\nparameters: {scale: &s 2.0}")
    assert (recipe.method, recipe.experts, recipe.parameters) == ("ties", {"x": "models"}, {"scale": 2.0})
    assert type(recipe.parameters["scale"]) is float


# ── the hash ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = "method: ties\nbase: b\nexperts: {x: p, y: q}\nparameters: {scale: 1.5, density: 0.3}"


@pytest.mark.parametrize(
    "same",
    [
        "experts: {x: p, y: q}\nparameters: {density: 0.3, scale: 1.5}\nbase: b\nmethod: ties",
        "# said differently\nmethod: 'ties'\nbase: b\nexperts:\n  x: p\n  y: q\nparameters:\n  scale: 15.0e-1\n  density: 0.30",
        PLAIN + "\nseed: 0\nprotocol: inductive\noverrides: []\ndtype: null",
    ],
    ids=["order of keys", "style", "defaults of the recipe"],
)
def test_what_does_not_matter_does_not_change_the_hash(same):
    assert parse(same).canonical_json() == parse(PLAIN).canonical_json()
    assert parse(same).sha256() == parse(PLAIN).sha256()


def test_defaults_of_the_method_do_not_change_the_hash():
    assert (
        parse("method: ties\nexperts: [a]").sha256() == parse("method: ties\nexperts: [a]\nparameters: {density: 0.2}").sha256()
    )


def test_one_is_one_point_zero():
    one, point = (
        parse(f"method: ties\nexperts: [a]\nparameters: {{density: 0.2, over: model, scale: {s}}}") for s in ("2", "2.0")
    )
    assert one.sha256() == point.sha256()


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("ties", "dare"),
        PLAIN.replace("base: b", "base: c"),
        PLAIN.replace("p,", "pp,"),
        PLAIN.replace("x:", "z:"),
        PLAIN.replace("{x: p, y: q}", "{y: q, x: p}"),  # weights go by the experts' order
        PLAIN.replace("0.3", "0.31"),
        PLAIN + "\nseed: 1",
        PLAIN + "\ndtype: float16",
        PLAIN + "\noverrides: [{match: '*', parameters: {}}]",
    ],
)
def test_what_matters_changes_the_hash(other):
    assert parse(other).sha256() != parse(PLAIN).sha256()


def test_the_hash_is_pinned():
    # records are joined by it: it must not change from release to release
    assert len(parse(PLAIN).sha256()) == 64
    assert parse(PLAIN).canonical_json() == (
        '{"base":"b","dtype":null,"experts":[["x","p"],["y","q"]],"method":"ties","overrides":[],'
        '"parameters":{"density":0.3,"over":"model","scale":1.5},"protocol":"inductive","seed":0,"suite":null}'
    )


@pytest.mark.parametrize(
    "recipe",
    [
        parse(FULL),
        parse(PLAIN),
        parse("method: average\nexperts: {b: p, a: q}\nparameters: {weights: [1, 2]}"),
        Recipe(method="average", experts={"no": "yes", "1e-3": "010", "0x1": "null", "~": "", "é": "a: b # c", "12:30": "- x"}),
        Recipe(method="ties", parameters={"scale": 1e-7, "density": 1e-300}),
    ],
    ids=["full", "plain", "order of experts", "words", "numbers"],
)
def test_as_yaml_it_is_the_same_recipe(recipe):
    again = parse(recipe.to_yaml())
    assert again == recipe
    assert list(again.experts) == list(recipe.experts)
    assert again.sha256() == recipe.sha256()


def test_all_errors_are_eutectics():
    assert issubclass(RecipeError, EutecticError)
