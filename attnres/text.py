"""Text of others, such as names in files, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with everything that a terminal does not print as a character of its own escaped, as `\x1b`.

    So no name can colour, move or erase what is on the screen, or turn round the direction of writing. Letters of any
    script stay as they are, and so do newlines.
    """
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


__all__ = ["printable"]
