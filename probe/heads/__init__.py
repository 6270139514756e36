"""In: a model and examples with answers. Out: what each attention head is worth, and which cover for each other.

`measure_heads` runs it, `plan` says what it will cost; models with depth routing and vanilla Qwen3 models alike.
"""

from probe.heads.ablations import KINDS, Head
from probe.heads.engine import Plan, measure_heads, plan
from probe.heads.result import HeadsResult

__all__ = ["KINDS", "Head", "HeadsResult", "Plan", "measure_heads", "plan"]
