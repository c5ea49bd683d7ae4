"""The fields that rules have in common: how they are checked, and said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any


def check_number(rule: Any, name: str) -> None:
    """TypeError where the field of a rule is no number."""
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(rule).__name__}: {name} must be a number, got {value!r}")


def check_integer(rule: Any, name: str, *, least: int = 1) -> None:
    """TypeError or ValueError where the field of a rule is no integer from ``least`` on."""
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(rule).__name__}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{type(rule).__name__}: {name} must be at least {least}, got {value}")


def check_word(rule: Any, name: str, allowed: tuple[str | None, ...]) -> None:
    """ValueError where the field of a rule is none of the words that it may be."""
    value = getattr(rule, name)
    if value not in allowed:
        words = ", ".join("None" if word is None else f'"{word}"' for word in allowed)
        raise ValueError(f"{type(rule).__name__}: {name} must be one of {words}, got {value!r}")


def check_amount(rule: Any) -> None:
    """TypeError or ValueError where a rule does not say how much goes."""
    kind = type(rule).__name__
    check_number(rule, "ratio")
    if not 0 <= rule.ratio < 1:
        raise ValueError(f"{kind}: ratio must be in [0, 1), got {rule.ratio}")
    if rule.threshold is not None:
        check_number(rule, "threshold")
        if not 0 <= rule.threshold < math.inf:
            raise ValueError(f"{kind}: threshold must be at least 0 and finite, got {rule.threshold}")


def say_criterion(criterion: str | Callable[..., Any]) -> str:
    """The criterion's name, or that of the function."""
    if isinstance(criterion, str):
        return criterion
    return getattr(criterion, "__name__", type(criterion).__name__)


def say_rule(rule: Any) -> str:
    """A rule as its call, with what decides how much goes and what differs from the defaults."""
    amount = "ratio" if rule.threshold is None else "threshold"
    words = [f"{amount}={getattr(rule, amount):g}"]
    for field in fields(rule):
        value = getattr(rule, field.name)
        if field.name not in ("ratio", "threshold") and value != field.default:
            words.append(f"{field.name}={say_criterion(value) if callable(value) else repr(value)}")
    return f"{type(rule).__name__}({', '.join(words)})"
