"""``Plan``: which layers of a model are pruned in which way."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from sparseops.prune.channels import Channels
from sparseops.prune.unstructured import Layers, Unstructured

Treatment: TypeAlias = "Channels | Unstructured | Layers | str | None"
"""What is done to a layer: a rule, a word of ``NAMED``, or None for nothing."""

RULES = (Channels, Unstructured, Layers)
"""The treatments that have settings."""

NAMED = ("2:4", "2:4t")
"""The treatments that are asked for by a word: of four neighbouring input channels two are zero; the same of
output channels too, so that the weight is 2:4 transposed as well."""


@dataclass(frozen=True, init=False, repr=False)
class Plan:
    """Treatments by name pattern, of which the first that matches a layer counts::

        Plan({"features.*": Channels(ratio=0.5), "head.*": "2:4", "*": None})

    A pattern (fnmatch) names a layer or a module that it lies in, as in ``include`` and ``exclude``. A
    treatment is a ``Channels``, an ``Unstructured``, a ``Layers``, "2:4", or "2:4t" (2:4 transposed as well);
    None leaves a layer dense, as does a plan without a pattern for it. Layers whose equal rules have scope
    "global" compete.

    rules: the pairs of pattern and treatment, in order.

    Raises:
        TypeError: ``rules`` is no mapping, a pattern is no string, or a treatment is of the wrong type.
        ValueError: there is no pattern, or a treatment is an unknown word.
    """

    rules: tuple[tuple[str, Treatment], ...]

    def __init__(self, rules: Mapping[str, Treatment]) -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"Plan: rules must be a mapping of name patterns to treatments, got {type(rules).__name__}"
            )
        if not rules:
            raise ValueError("Plan: rules must hold at least one name pattern, got none")
        for pattern, treatment in rules.items():
            if not isinstance(pattern, str):
                raise TypeError(f"Plan: rules must have name patterns as keys, got {pattern!r}")
            if treatment is None or isinstance(treatment, RULES) or treatment in NAMED:
                continue
            error = ValueError if isinstance(treatment, str) else TypeError
            words = ", ".join([rule.__name__ for rule in RULES] + [f'"{word}"' for word in NAMED])
            raise error(f"Plan: rules[{pattern!r}] must be a {words} or None, got {treatment!r}")
        object.__setattr__(self, "rules", tuple(rules.items()))

    def __repr__(self) -> str:
        return f"Plan({{{', '.join(f'{pattern!r}: {treatment!r}' for pattern, treatment in self.rules)}}})"


def plan_of(chosen: Mapping[str, Treatment]) -> Plan:
    """The plan that gives these layers what is chosen for them, and leaves all others as they are."""
    # The pattern of a model that is a layer itself is "*", since its name is empty.
    rules: dict[str, Treatment] = {glob.escape(name) or "*": option for name, option in chosen.items()}
    rules.setdefault("*", None)
    return Plan(rules)
