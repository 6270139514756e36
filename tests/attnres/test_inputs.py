"""What users hand over is bounded before anything is done with it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres import inputs
from attnres.inputs import check_memory, check_number, first_repeated, in_bytes, memory_bytes, parse_json, read_file


@given(value=st.floats(allow_nan=True) | st.integers(), least=st.integers(-100, 100), span=st.integers(0, 100))
def test_a_number_is_taken_if_and_only_if_it_is_between_the_ends(value, least, span):
    if least <= value <= least + span:
        check_number("size", value, least, least + span)
    else:
        with pytest.raises(ValueError, match=r"^size must be at (least|most) -?\d+, got "):
            check_number("size", value, least, least + span)


def test_a_file_is_read_whole_up_to_the_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_file(path, 3) == b"abc"
    with pytest.raises(ValueError, match=r"file has 3 bytes, at most 2 bytes are read$"):
        read_file(path, 2)


def test_what_may_never_end_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    cases = {
        tmp_path / "pipe": "is a pipe, socket or device: expected a regular file",
        tmp_path / "link": "is a pipe, socket or device",
        Path("/dev/zero"): "is a pipe, socket or device",
        tmp_path: "is a folder: expected a regular file",
        tmp_path / "sparse": "has 1.0 TiB, at most 64.0 MiB are read",
        tmp_path / "none": r"cannot be read \(No such file or directory\)",
        Path("/proc/self/smaps"): "has more than 10 bytes",  # its size is said to be 0
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=f"^{path} {message}"):
            read_file(path, 10 if path.name == "smaps" else inputs.JSON_BYTES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=json_values)
def test_json_is_read_as_it_is(value):
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ("{", "Expecting"),
        ("", "Expecting value"),
    ],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@given(names=st.lists(st.sampled_from("abc")))
def test_the_first_name_that_was_there_before(names):
    expected = next((name for i, name in enumerate(names) if name in names[:i]), None)
    assert first_repeated(names) == expected


def test_memory_is_refused_from_what_the_machine_has_on():
    held = memory_bytes()
    assert 2**28 < held < 2**50
    check_memory("it", held, "less")
    with pytest.raises(ValueError, match=r"^it would take .*iB of memory or more, this machine has .*iB: take less$"):
        check_memory("it", 2 * held, "take less")


@given(count=st.integers(0, 2**70))
def test_bytes_are_written_within_five_per_cent(count):
    number, unit = in_bytes(count).split()
    size = 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
    assert math.isclose(float(number.replace(",", "")) * size, count, rel_tol=0.05, abs_tol=0)
