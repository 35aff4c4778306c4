"""Plain values of a bounded number; everything else is refused with its place."""

import pytest
import yaml

from clipkit import safe_yaml


def test_plain_values_and_anchors_are_read():
    text = "a: &a {x: 1}\nb: [*a, *a]\nc: 2024-01-01\n"
    assert safe_yaml.load(text) == yaml.safe_load(text)
    assert safe_yaml.load("") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9)),
         "more than 100,000 values"),
        ("a: &a [*a]\n", "holds itself"),
        ("[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: [\n", "expected"),
    ],
)  # fmt: skip
def test_what_is_refused(text, problem):
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        safe_yaml.load(text)
    assert problem in str(refused.value.problem)


@pytest.mark.parametrize(
    "text",
    ["!!bool x", "!!int ''", "!!int x", "!!float x", "!!timestamp x", "2001-99-99",
     "2001-01-01 00:00:00 +99:99", "!!int 0b", "!!binary é",
     "9" * 5000, "0x" + "f" * 5000, "9223372036854775808"],
)  # fmt: skip
def test_what_is_not_what_its_tag_says_is_named_with_its_line(text):
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        safe_yaml.load(f"a: 1\nb:\n- [{text}]\n")
    assert refused.value.problem_mark.line == 2
    assert len(refused.value.problem) < 150


def test_numbers_as_wide_as_the_machine_counts_are_read():
    assert safe_yaml.load("[9223372036854775807, -9223372036854775807]") == [2**63 - 1, 1 - 2**63]
