"""All kinds of input."""

from tests.fuzz.commands import IN_COMMANDS
from tests.fuzz.files import IN_FILES

KINDS = (*IN_FILES, *IN_COMMANDS)
__all__ = ["KINDS"]
