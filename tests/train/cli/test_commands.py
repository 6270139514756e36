"""The table of commands: what `attnres-train` says of itself, and of a command that does not exist."""

from __future__ import annotations

import pytest

from probe.command_line import nearest_option
from train.cli import main
from train.cli.commands import COMMANDS


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name:<10} {what}\n" in shown for name, (what, _) in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: attnres-train {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt", "--help"], "command fitt does not exist; did you mean fit?"),
        (["xyz"], "command xyz does not exist; choose from fit, validate, estimate, study, panels"),
        ([], "a command is required; choose from fit, validate, estimate, study, panels"),
    ],
)
def test_a_command_that_does_not_exist_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert (end.value.code, capsys.readouterr().err) == (2, f"attnres-train: error: {message}\n")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.hiden_size", "model.hidden_size"),
        ("hidden_size", "model.hidden_size"),
        ("trainer.steps", "trainer.max_steps"),
        ("model.nope", None),
        ("data.curriculum.nope", None),
    ],
)
def test_only_options_that_are_alike_are_suggested(key, nearest):
    known = ["model.hidden_size", "model.betas", "trainer.max_steps", "data.curriculum.steps"]
    assert nearest_option(key, known) == nearest
