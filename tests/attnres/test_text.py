"""What is printed of other people's text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attnres.text import printable


@given(st.text())
def test_nothing_but_printable_characters_and_newlines_is_left(text):
    shown = printable(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    if text.replace("\n", "").isprintable():
        assert shown == text


def test_control_characters_are_escaped_by_name():
    assert printable("a\x1b[31mred\x07") == r"a\x1b[31mred\x07"
    assert printable("right\u202eleft") == r"right\u202eleft"
    assert printable("\ud800") == r"\ud800"  # of a file name that is not UTF-8
    assert printable("层 é →\nnext") == "层 é →\nnext"
