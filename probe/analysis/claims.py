"""The study's claims (arXiv:2606.13168), asked of one model: each a sentence computed from rows that it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "cannot be tested"
TITLES = {
    "C1": "content independence",
    "C2": "motifs",
    "C3": "dissociation",
    "C4": "mass without role",
}


@dataclass(frozen=True)
class Claim:
    """One statement about one model.

    Attributes:
        claim: C1 to C4.
        verdict: "holds", "does not hold" or "cannot be tested".
        text: the statement, in a line.
        rows: the keys of the table rows that it rests on, each with its `table`.
    """

    claim: str
    verdict: str
    text: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.claim]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"title": self.title}
