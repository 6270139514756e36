"""All kinds of input."""

from tests.fuzz.commands import IN_COMMANDS
from tests.fuzz.configs import IN_CONFIGS
from tests.fuzz.files import IN_FILES
from tests.fuzz.models import IN_MODELS
from tests.fuzz.records import IN_RECORDS

KINDS = (*IN_FILES, *IN_COMMANDS, *IN_CONFIGS, *IN_RECORDS, *IN_MODELS)
__all__ = ["KINDS"]
