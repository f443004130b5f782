"""``defend`` in a recipe, and in Python: it stands for the defence's own recipe."""

import pytest
from tests.bench.cuts import cut

import eutectic as eu
from eutectic.bench import zoo
from eutectic.checkpoint.hashed import fingerprint
from eutectic.errors import ParameterError, RecipeError, UnknownNameError
from eutectic.merge.recipe import parse

MERGE = "method: ties\nsuite: mini\nparameters:\n  scale: 0.6\n"


def test_it_is_the_recipe_of_the_defence_with_the_merge_in_its_parameters():
    found = parse(MERGE + "defend: norm_clip\n")
    spelt_out = "method: norm_clip\nsuite: mini\nparameters: {method: ties, parameters: {scale: 0.6}}\n"
    assert found == parse(spelt_out)
    assert found.sha256() == parse(spelt_out).sha256()
    assert found.is_fitted
    more = parse(MERGE + "defend:\n  method: norm_clip\n  parameters: {most: 2.0}\n")
    assert more.parameters == {"most": 2.0, "method": "ties", "parameters": {"scale": 0.6}}
    assert parse(MERGE + "defend: auto\n").method == "defence_ladder"
    assert parse(found.to_yaml()) == found


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            MERGE + "defend: norm_clop\n",
            UnknownNameError,
            r"recipe:5: no defence is called 'norm_clop'. Did you mean 'norm_clip'",
        ),
        (MERGE + "defend: fisher\n", UnknownNameError, "recipe:5: no defence is called 'fisher'"),
        (MERGE + "defend: [norm_clip]\n", ParameterError, "recipe:5: name a defence, or a mapping"),
        (MERGE + "defend:\n  norm_clip:\n    most: 2.0\n", ParameterError, "recipe:5: name a defence, or a mapping"),
        (MERGE + "defend:\n  method: norm_clip\n  parameters:\n    most: -1\n", ParameterError, "recipe:8: .*most"),
        (MERGE + "defend:\n  method: norm_clip\n  parameters:\n    method: dare\n", ParameterError, "recipe:8: `method` of a"),
        (MERGE.replace("scale: 0.6", "scaled: 0.6") + "defend: norm_clip\n", ParameterError, "recipe:4: .*'scaled'"),
        (MERGE.replace("ties", "tie") + "defend: norm_clip\n", UnknownNameError, "recipe:1: no method is called 'tie'"),
        ("method: fisher\nsuite: mini\ndefend: norm_clip\n", ParameterError, "recipe:1: fisher is fitted"),
        (MERGE + "defence: norm_clip\n", RecipeError, "recipe:5: unknown key 'defence'. Did you mean 'defend'"),
    ],
)
def test_what_cannot_be_defended_is_refused_with_its_line(text, kind, says):
    with pytest.raises(kind, match=says):
        parse(text)


def test_in_python_it_is_the_same(tmp_path):
    suite = zoo.open_suite(str(cut(tmp_path, ["letters", "digits8"], {"train": 4, "val": 4, "adapt": 12, "test": 12})))
    given = {"experts": suite.experts(), "tasks": suite.tasks}
    one = eu.fuse("task_arithmetic", suite.backbone(), defend="norm_clip", scale=0.3, **given)
    other = eu.fuse("norm_clip", suite.backbone(), method="task_arithmetic", parameters={"scale": 0.3}, **given)
    assert one.artefact.about["method"] == "norm_clip"
    assert fingerprint(eu.open(one)) == fingerprint(eu.open(other))
