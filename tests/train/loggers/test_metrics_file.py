"""A file of metrics is read as rows of numbers, or refused by its line."""

from __future__ import annotations

import pytest

from train.loggers.metrics_file import read_metrics


def test_a_last_row_that_is_not_whole_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,accuracy\n0,1.5,\n1,nan,0.25\n2,1e-")
    rows = [{"step": "0", "loss": "1.5", "accuracy": ""}, {"step": "1", "loss": "nan", "accuracy": "0.25"}]
    assert read_metrics(path) == (["step", "loss", "accuracy"], rows)
    path.write_text("")
    assert read_metrics(path) == ([], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"loss\n1\n", "lacks the column step"),
        (b"step,loss\n0,1\n1\n", "line 3, is no row of 2 numbers with a step"),
        (b"step,loss\n0,1,2\n", "line 2, is no row of 2 numbers"),
        (b"step,loss\none,1\n", "line 2, is no row"),
        (b"step,loss\n,1\n", "line 2, is no row"),
        (b"step,loss\n1,many\n", "line 2, is no row"),
        (b"step,loss\n\n1,2\n", "line 2, is no row"),
        (b"step,loss\n\xff,2\n", "is not a text file in UTF-8"),
    ],
)
def test_damage_is_named(content, message, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_metrics(path)
    assert str(error.value).startswith(str(path))
    assert "restore it, or remove it" in str(error.value)
