import doctest

import pytest

from clipkit.errors import UserError
from clipkit.evaluation import (
    TEMPLATES,
    class_name_warnings,
    collect,
    expand,
    fill,
    prompts,
    resolve_templates,
)


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(prompts).failed == 0


def test_both_placeholders_are_filled_and_other_braces_stay() -> None:
    assert fill("{c} or {} {d} {{}}", "{c}") == "{c} or {c} {d} {{c}}"


def test_each_different_prompt_is_written_once() -> None:
    found = expand(["a cat", "dog", "a cat"], ["{}", "this is {c}", "{}"])
    assert found.unique == ["a cat", "this is a cat", "dog", "this is dog"]
    assert found.class_of_prompt.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.prompt_index.tolist() == [0, 1, 0, 2, 3, 2, 0, 1, 0]


def test_prompts_may_be_written_out_a_class() -> None:
    found = collect([["a red one", "x"], ["x"]])
    assert found.unique == ["a red one", "x"]
    assert found.class_of_prompt.tolist() == [0, 0, 1]
    assert found.prompt_index.tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_set_of_templates_has_a_name(name: str) -> None:
    assert resolve_templates(name) == TEMPLATES[name]
    assert all(fill(template, "fox") != template for template in TEMPLATES[name])


def test_templates_may_be_one_or_a_list() -> None:
    assert resolve_templates("art of {}") == ("art of {}",)
    assert resolve_templates(["{c}", "{}"]) == ("{c}", "{}")
    assert expand(["fox"]).unique == ["a photo of a fox."]
    assert len(TEMPLATES["imagenet_7"]) == 7


@pytest.mark.parametrize("templates", ["photos", ["{}", "a photo"], []])
def test_templates_without_a_place_are_refused(templates: str | list[str]) -> None:
    with pytest.raises(UserError, match="templates"):
        expand(["fox"], templates)


def test_no_class_names_are_refused() -> None:
    with pytest.raises(UserError, match="no class name"):
        expand([])


def test_empty_and_repeated_names_are_warned_of() -> None:
    assert class_name_warnings(["fox", "dog"]) == []
    empty, repeated = class_name_warnings(["missile", " ", "fox", "missile", ""])
    assert empty == "an empty name has class 1, 4, counted from 0"
    assert "'missile' (0, 3)" in repeated
