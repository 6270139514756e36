"""Reading a task's settings back from plain values."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_type_hints

MOST_TOKENS = 2**31 - 1
"""Of a vocabulary, and of a sequence as far as a setting tells; what fits a model is fewer."""


def read_settings(cls: type, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the plain `settings` of the task `name` and return them as arguments of the dataclass `cls`.

    Raises:
        ValueError: the settings are another task's, or `cls` has no such setting, or not of that type.
    """
    given = dict(settings)
    if given.pop("task", None) != name:
        raise ValueError(f"task {reprlib.repr(settings.get('task'))} is not {name}")
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"unknown task setting {reprlib.repr(key)}; choose from {', '.join(known)}")
        types = get_args(hints[key]) if isinstance(hints[key], UnionType) else (hints[key],)
        if type(value) not in types:  # a bool is no integer
            raise ValueError(
                f"task setting {key} must be {'an integer' if int in types else 'a string'}, got {reprlib.repr(value)}"
            )
    return given


__all__ = ["read_settings"]
