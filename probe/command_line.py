"""What both programs share: a table of commands, how a command ends, and the nearest name for a misspelt one.

Nothing heavy is imported here, and a command's own modules only when it is run: `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import os
import pkgutil
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from probe.failures import (
    OF_THE_NAME,
    STOPPED,
    CannotGoOn,
    Stopped,
    disk_error,
    ignore_signals,
    in_words,
    is_bad_input,
    is_out_of_memory,
    one_line,
    raising_signals,
    where,
)

TRACEBACK = "ATTNRES_TRACEBACK"
Command = Callable[[list[str]], int]
"""Takes the arguments after its name, and returns the exit status."""


class UsageError(ValueError):
    """Input that cannot be used; the message is one line for the user."""


def lazily(place: str) -> Command:
    """The command at `place`, as in "package.module:function", which is imported when it is run."""
    return lambda args: pkgutil.resolve_name(place)(args)


def run_program(
    program: str,
    about: str,
    commands: Mapping[str, tuple[str, Command]],
    args: Sequence[str] | None,
) -> int:
    """Run one of `commands` (name -> what it does, and it); `args` defaults to the command line's.

    The one place where a command ends. Whatever ends it early is one line on standard error, and an exit status:

    ====  ==============================================================================================
    2     bad input: a `ValueError` of our own code
    130   SIGINT, and 143 SIGTERM: the line has the command that goes on
    74    the system could not read or write a file
    1     work that cannot go on (`CannotGoOn`), too little memory, or a bug, which the line says how to report
    ====  ==============================================================================================

    With ATTNRES_TRACEBACK=1 in the environment, tracebacks are printed too.
    """
    given = list(sys.argv[1:] if args is None else args)
    name, *options = given or [""]
    if name in ("-h", "--help"):
        lines = [f"  {known:<10} {what}" for known, (what, _) in commands.items()]
        hint = f"`{program} COMMAND --help` lists the options of a command."
        print("\n".join([f"usage: {program} COMMAND ...", "", about, "", *lines, "", hint]))
        return 0
    with raising_signals():
        try:
            if name not in commands:
                nearest = nearest_option(name, commands)
                hint = f"did you mean {nearest}?" if nearest else f"choose from {', '.join(commands)}"
                raise UsageError(f"command {name} does not exist; {hint}" if name else f"a command is required; {hint}")
            return commands[name][1](options)
        except (Exception, KeyboardInterrupt, Stopped) as error:
            ignore_signals()  # this command is about to end as it is
            status, line = explain_end(error, shlex.join([program, *given]))
            if os.environ.get(TRACEBACK) == "1":
                traceback.print_exception(error)
            whole = f"{program} {name}" if name in commands else program
            print(f"{whole}: {one_line(line)}", file=sys.stderr)
            sys.exit(status)


def explain_end(error: BaseException, command: str) -> tuple[int, str]:
    """The exit status of a `command` that `error` has ended, and what is said of it."""
    goes_on = getattr(error, "goes_on", command)
    if isinstance(error, KeyboardInterrupt):
        error = Stopped(signal.SIGINT)
    if isinstance(error, Stopped):
        return STOPPED + error.number, f"{error}; go on with: {goes_on}"
    if isinstance(error, UsageError) or is_bad_input(error):
        return 2, f"error: {error}"
    if isinstance(error, CannotGoOn):
        return 1, f"error: {error}"
    if is_out_of_memory(error):
        return 1, f"error: not enough memory ({in_words(error)[:200]}); a smaller batch needs less"
    if disk := disk_error(error):
        name = disk.filename or next(iter(getattr(error, "__notes__", ())), "")  # noted by who wrote it
        file = f"'{name}': " if name else ""
        if disk.errno in OF_THE_NAME:
            return 2, f"error: {file}{disk.strerror}"
        return os.EX_IOERR, f"error: {file}{disk.strerror}; what was written stays; go on with: {goes_on}"
    hint = f"please report it, with what the same command prints with {TRACEBACK}=1"
    return 1, f"internal error: {in_words(error)} ({where(error)}); {hint}"


class OneLineParser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage, and takes no abbreviated options: they would hide typos."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option.lstrip("-") for option in self._option_string_actions]
        raise UsageError(explain(message, known, self.prog)) from None


def explain(message: str, known_options: Iterable[str], program: str) -> str:
    """A parser's message in words for users, with the nearest option for an unknown one."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("Expected a ", "expected ")
    message = message.replace("typing.Literal", "one of ").replace("Parser key", "option").replace("NoneType", "null")
    message = message.replace("tuple[str, ...]", "a list such as [a,b]")
    in_file = r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)"
    if unknown := re.search(rf"unrecognized arguments: --([\w.-]+)|{in_file}", message):
        key = unknown[1] or unknown[2]
        nearest = nearest_option(key, known_options)
        hint = f"did you mean {nearest}?" if nearest else f"`{program} --help` lists the options"
        return f"option {key} does not exist; {hint}"
    if group := re.match(
        r"option \"(model|data|probe|trail|trainer)\":\s+Unable to load config ['\"]([^'\"]*)", message
    ):
        example = "; the plain Qwen3 is model.architecture: vanilla" if group[1] == "model" else ""
        return f"{group[1]} must be a mapping of options or a file that holds one, got {group[2]}{example}"
    # A value of none of several types comes with a paragraph on each.
    several = r"Does not validate against any of the Union subtypes\s+Subtypes: [\[(](.*)[\])]\s+Errors:.*value: (.*)"
    return re.sub(several, r"expected \1, got \2", message, flags=re.DOTALL)


def nearest_option(key: str, known: Iterable[str]) -> str | None:
    """The known option most like `key`, if their last parts are alike too: a shared group alone is not enough."""
    matcher = difflib.SequenceMatcher(b=key.rpartition(".")[2])
    alike = []
    for option in known:
        matcher.set_seq1(option.rpartition(".")[2])
        if matcher.ratio() > 0.6:
            alike.append(option)
    return next(iter(difflib.get_close_matches(key, alike, n=1, cutoff=0.6)), None)
