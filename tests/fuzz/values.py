"""Strategies for hostile values: texts, numbers, JSON and YAML documents that were edited, bytes that were damaged."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NUMBERS = (0, 1, -1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
FLOATS = (0.0, -0.0, 0.5, 1.5, -1.0, 1e-320, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    *("", " ", "0", "-1", "1e9", "1e400", "nan", "inf", "-inf", "null", "true", "none", "x", "all", "a,b", "[", "[]"),
    *("{}", "[all,all]", "[1,2]", "{a: 1}", "a: b: c", "*a", "&a [*a]", "!!python/object:os.system", "@x", "%s", "{0}"),
    *("\x1b[31mred\x1b[0m", "a\nb", "a\tb", "\u202eright", "层", "é" * 50, "a" * 5000, "../../etc/passwd", "/dev/null"),
    *("/dev/zero", "/proc/self/mem", "~", "-", "--", "--output", "=", "a=b", "'", '"', "\\", "$HOME", "`id`", "0x10"),
    *("1_000", "١٢", "9" * 400, "[" * 300, "{" * 300, "early", "mask_renormalise", "os.path", "probe.ablation", "."),
)
SCALARS: SearchStrategy[Any] = st.one_of(
    st.sampled_from((None, True, False, *NUMBERS, *FLOATS, *TEXTS, "\0", "\ud800")),
    st.integers(-100, 100),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
"""As values of JSON."""
HOSTILE: SearchStrategy[Any] = st.one_of(
    SCALARS,
    SCALARS,
    st.sampled_from(([], {}, [[]], [None], {"": None}, [{}], {"a": {"b": {}}})),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=3),
)
WORDS: SearchStrategy[str] = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from((*NUMBERS, *FLOATS)).map(str),
    st.integers(-5, 300).map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
)
"""As arguments of a command line, which hold no NUL."""


def edited(draw: DrawFn, document: Any, values: SearchStrategy[Any] = HOSTILE, edits: int = 3) -> Any:
    """`document`, of mappings and lists, after some edits: an item replaced, dropped, renamed, added or repeated."""
    document = copy.deepcopy(document)
    values = values.map(copy.deepcopy)  # those that are drawn again must not share what is edited
    for _ in range(draw(st.integers(0, edits))):
        places = list(_places(document))
        if not places:
            return draw(values)
        owner, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 9)):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[draw(st.text(max_size=4))] = owner.pop(key)
            case 2 if isinstance(owner, dict):
                owner[draw(st.text(max_size=4))] = draw(values)
            case 2 | 1:
                owner.append(draw(values))
            case 3 if isinstance(owner, list):
                owner.append(copy.deepcopy(owner[key]))
            case 4:
                owner[key] = [owner[key]]
            case 5:
                owner[key] = str(owner[key])
            case _:
                owner[key] = draw(values)
    return document


def _places(document: Any) -> Any:
    """(owner, key) of every item, at any depth."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value)


@st.composite
def json_texts(draw: DrawFn, documents: tuple[Any, ...], values: SearchStrategy[Any] = HOSTILE) -> bytes:
    """One of `documents` as JSON, edited by `values`, and perhaps damaged."""
    text = json.dumps(edited(draw, draw(st.sampled_from(documents)), values))
    return damaged(draw, text.encode(), often=False)


NESTED = (b"[" * 200_000, b'{"a":' * 100_000, b"9" * 10_000, b"1e999999", b'{"a": 1, "a": 2}', b"\xff\xfe{\x00}\x00")


def damaged(draw: DrawFn, content: bytes, often: bool = True) -> bytes:
    """`content` with a byte flipped, cut off, with something in it, or replaced; or whole, if not `often`."""
    match draw(st.integers(0 if often else -8, 6)):
        case 0 | 1 if content:
            place = draw(st.integers(0, len(content) - 1))
            flipped = content[place] ^ draw(st.integers(1, 255))
            return content[:place] + bytes([flipped]) + content[place + 1 :]
        case 2:
            return content[: draw(st.integers(0, len(content)))]
        case 3:
            place = draw(st.integers(0, len(content)))
            return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
        case 4:
            return draw(st.sampled_from((b"", b"\0", b"\xef\xbb\xbf" + content, content + content, *NESTED)))
        case 5:
            return content.replace(b"\n", b"\r\n") + b"\n"
        case 6:
            return draw(st.binary(max_size=40))
    return content


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(12)
)
YAMLS = (
    BOMB,
    "a: &a\n  b: *a\n",
    "[" * 5000,
    "{a: " * 3000,
    "- " * 3000,
    "? [a, b]\n: 1\n",
    "1: 2\nnull: 3\n",
    "!!python/object/apply:os.system [id]\n",
    "!!binary aGk=\n",
    "seed_everything: 2020-01-01\n",
    "a: 1\n---\nb: 2\n",
    "%YAML 9.9\n---\na: 1\n",
    "model: {<<: {hidden_size: 4}}\n",
    "\t- x\n",
    "\x00",
)


@st.composite
def yaml_texts(draw: DrawFn, documents: tuple[Any, ...], values: SearchStrategy[Any] = HOSTILE) -> bytes:
    """One of `documents` as YAML, edited by `values`, and perhaps damaged or with something else in it."""
    if draw(st.integers(0, 11)) == 0:
        return draw(st.sampled_from(YAMLS)).encode()
    text = yaml.safe_dump(edited(draw, draw(st.sampled_from(documents)), values.filter(_in_yaml)), sort_keys=False)
    return damaged(draw, text.encode("utf-8", "surrogatepass"), often=False)


def _in_yaml(value: Any) -> bool:
    try:
        yaml.safe_load(yaml.safe_dump(value))
    except (yaml.YAMLError, UnicodeError):
        return False
    return True


__all__ = ["FLOATS", "HOSTILE", "NUMBERS", "SCALARS", "TEXTS", "WORDS", "damaged", "edited", "json_texts", "yaml_texts"]
