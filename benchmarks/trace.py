"""Cost of a causal trace over all sites and positions, in both directions, against one full forward for every patch.

    python -m benchmarks.trace --output benchmarks/results/trace.json

Random models of 12 layers, 64 wide, on recall with 8 pairs (24 tokens). The naive loop gives every patch a full forward
of all its sequences, with hooks, as any patching tool does (tests/support/naive_trace.py), and reads the same two
logits. Of the trace's two flips, `drawn` changes the value of any key, so that what comes before it is the same in both
runs and need not be patched; `worst` changes the first value and asks at the last position. The trace is timed before
and after the naive loop, by the processor's clock, as other work may share the machine; only ratios mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR
from benchmarks import record
from probe.trace import Flips, plan, trace, trace_sites
from tests.support.naive_trace import NaiveTrace

TASK = MQAR(num_pairs=8, vocab_size=64)
SHAPE: dict[str, Any] = {
    **{"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 128, "vocab_size": TASK.vocab_size},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.1},
}
MODELS = ("cumulative", "block_sum", "vanilla")
FLIPS = ("drawn", "worst")


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "vanilla":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    return AttnResForCausalLM(AttnResConfig(**SHAPE, attnres_source=name, attnres_num_blocks=4)).eval()


def make_flips(name: str, count: int) -> Flips:
    """The value of one key is changed to one that is not in the context, and that key asked for."""
    batch, rows = TASK.batch("probe", range(count)), torch.arange(count)
    query = rows % TASK.num_pairs
    ids, pair = batch.input_ids, batch.query_order[rows, query]
    if name == "worst":
        ids, pair, query = ids.clone(), torch.zeros_like(pair), torch.full_like(query, TASK.num_pairs - 1)
        ids[:, -1] = batch.keys[:, 0]
    free = range(TASK.first_value, TASK.first_noise)
    new = torch.tensor([next(v for v in free if v not in values) for values in batch.values.tolist()])
    corrupted = ids.clone()
    corrupted[rows, 2 * pair + 1] = new
    return Flips(ids, corrupted, 2 * TASK.num_pairs + query, batch.values[rows, pair], new)


def naive(model: Any, flips: Flips) -> np.ndarray:
    """What `TraceResult.logits` is."""
    runs, rows = NaiveTrace(model, flips.clean_ids, flips.corrupted_ids), torch.arange(len(flips))
    answers = torch.stack((flips.answer, flips.flipped_answer), dim=1)
    sites, length = trace_sites(model), flips.cut().clean_ids.shape[1]
    found = np.zeros((2, len(sites), length, len(flips), 2), np.float32)
    for (d, base), (s, site), position in product(enumerate(("corrupted", "clean")), enumerate(sites), range(length)):
        mask = (torch.arange(flips.clean_ids.shape[1]) == position).expand(len(flips), -1)
        logits = runs.logits(base, site.kind, site.read, mask, site.source)
        found[d, s, position] = logits[rows, flips.position].gather(1, answers).numpy()
    return found


def measure(model_name: str, flips_name: str, count: int) -> dict[str, Any]:
    model, flips = make_model(model_name), make_flips(flips_name, count)
    trace(model, flips, ["stream"])  # warm up
    seconds: dict[str, list[float]] = {"trace": [], "naive": []}
    results: dict[str, Any] = {}
    for name, work in (("trace", trace), ("naive", naive), ("trace", trace)):
        started = time.process_time()
        results[name] = work(model, flips)
        seconds[name].append(time.process_time() - started)
    planned, found = plan(model, flips), results["trace"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": model_name,
        "flips": flips_name,
        "patches": int(np.prod(found.logits.shape[:3])),
        "sites": len(found.sites),
        "forward_passes": {"planned": planned.forward_passes, "spent": found.forward_passes, "naive": planned.naive},
        "passes": planned.passes,
        "seconds": median,
        "fewer_forward_passes": planned.naive / found.forward_passes,
        "speedup_over_naive": median["naive"] / median["trace"],
        "largest_difference_of_logits": float(np.abs(found.logits - results["naive"]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sequences", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for model_name in options.models:
        started = time.perf_counter()
        results = [measure(model_name, flips_name, options.num_sequences) for flips_name in FLIPS]
        about = {"sequences": options.num_sequences, "layers": SHAPE["num_hidden_layers"], "torch": torch.__version__}
        record.add(options.output, model_name, results, time.perf_counter() - started, **about)


if __name__ == "__main__":
    main()
