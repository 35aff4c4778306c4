"""Class names to prompts: templates, ensembles of them, and each different prompt only once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.errors import UserError

# The seven that forward selection over the 80 of ImageNet chose, as good as the 80 or slightly
# better: https://github.com/openai/CLIP/blob/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb
TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "imagenet_7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}

# CLIP's own templates write {}, those of CLIP_benchmark {c}.
_PLACEHOLDER = re.compile(r"\{c?\}")


class Prompts(NamedTuple):
    """Prompts without repeats, and where each (class, template) pair finds its own.

    `build_classifier(embeddings[prompt_index], class_of_prompt, num_classes)`, where embeddings are
    those of `unique`.
    """

    unique: list[str]
    class_of_prompt: Tensor  # (P,) int64
    prompt_index: Tensor  # (P,) int64, into unique

    def of_classes(self) -> list[tuple[int, str]]:
        """Return every prompt with its class, repeats too."""
        texts = [self.unique[index] for index in self.prompt_index.tolist()]
        return list(zip(self.class_of_prompt.tolist(), texts, strict=True))


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Returns templates from a name in `TEMPLATES`, one template, or a list of templates.

    Raises:
        UserError: a template without a place for the class name, or no template.
    """
    if isinstance(templates, str):
        templates = TEMPLATES.get(templates, (templates,))
    if not templates:
        raise UserError("templates is an empty list; at least one is needed, as 'a photo of a {}.'")
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise UserError(
                f"templates: {template!r} has no place for the class name; write {{}} or {{c}} "
                f"there, or one of the names {', '.join(TEMPLATES)}"
            )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """Puts a class name at every {} or {c} of a template; other braces stay.

    >>> fill("a {c}, a small {}", "red fox")
    'a red fox, a small red fox'
    """
    return _PLACEHOLDER.sub(lambda _: class_name, template)


def expand(class_names: Sequence[str], templates: str | Sequence[str] = "photo") -> Prompts:
    """Fills every template with every class name, class by class."""
    templates = resolve_templates(templates)
    return collect([[fill(template, name) for template in templates] for name in class_names])


def collect(prompts_of_class: Iterable[Iterable[str]]) -> Prompts:
    """Numbers prompts that are written out a class, each different one once."""
    index: dict[str, int] = {}
    class_of_prompt, prompt_index = [], []
    for which, prompts in enumerate(prompts_of_class):
        for prompt in prompts:
            class_of_prompt.append(which)
            prompt_index.append(index.setdefault(prompt, len(index)))
    if not index:
        raise UserError("there is no class name to make a prompt of")
    return Prompts(
        list(index),
        torch.tensor(class_of_prompt, dtype=torch.int64),
        torch.tensor(prompt_index, dtype=torch.int64),
    )


def readable(class_name: str) -> str:
    """Returns a class name as a caption writes it: underscores and runs of space are one space.

    >>> readable("n02_Granny__Smith ")
    'n02 Granny Smith'
    """
    return " ".join(class_name.replace("_", " ").split())


def class_name_warnings(class_names: Sequence[str]) -> list[str]:
    """Returns one sentence for empty names and one for names used twice, none for a clean list."""
    classes: dict[str, list[int]] = {}
    for which, name in enumerate(class_names):
        classes.setdefault(name.strip(), []).append(which)
    warnings = []
    if empty := classes.pop("", []):
        warnings.append(f"an empty name has class {_some(map(str, empty))}, counted from 0")
    if repeated := {name: ids for name, ids in classes.items() if len(ids) > 1}:
        shown = _some(f"{name!r} ({', '.join(map(str, ids))})" for name, ids in repeated.items())
        warnings.append(
            f"class names used more than once: {shown}; such classes cannot be told apart and "
            "share the credit"
        )
    return warnings


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:10]) + (", ..." if len(items) > 10 else "")
