"""Which recipes solve 16-pair recall: many small trainings, several at once, one JSON line each.

    python benchmarks/recipe.py --output recipe.jsonl --workers 2 --device cpu

Each line holds what differs from `DEFAULTS`, the first step with validation accuracy >= 0.99 (`solved`), the final
validation accuracy and the pairs reached. A bare loop on purpose: what it finds is then configured in configs/.
docs/recipe.md reads benchmarks/results/recipe.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR

DEFAULTS: dict[str, Any] = {
    "architecture": "cumulative",  # vanilla, cumulative or block_sum; 8 layers, 4 blocks, hidden 64, 4 heads, MLP 128
    "embedding_init_std": 0.02,
    "initializer_range": 0.02,
    "learning_rate": 3e-3,
    "curriculum": "when_solved",  # or linear, off
    "growth": "double",  # or increment
    "linear_steps": 600,
    "max_steps": 600,
    "seed": 0,
}
CONDITIONS = [
    {"architecture": architecture, "embedding_init_std": std, "growth": growth}
    for architecture in ("vanilla", "cumulative", "block_sum")
    for std in (0.02, 0.3, 1.0)
    for growth in ("double", "increment")
]
SEEDS = range(5)
K, BATCH = 16, 64


def build(job: dict[str, Any]) -> nn.Module:
    shape = {
        **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 3 * K},
        **{"tie_word_embeddings": False, "initializer_range": job["initializer_range"]},
    }
    if job["architecture"] == "vanilla":
        model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        config = AttnResConfig(**shape, attnres_num_blocks=4, attnres_source=job["architecture"])
        model = AttnResForCausalLM(config)
    nn.init.normal_(model.get_parameter("model.embed_tokens.weight"), std=job["embedding_init_std"])
    return model


def next_pairs(job: dict[str, Any], step: int, pairs: int, running: float) -> int:
    if job["curriculum"] == "off":
        return K
    if job["curriculum"] == "linear":
        return min(K, 1 + (K - 1) * step // job["linear_steps"])
    if running <= 0.9:
        return pairs
    return min(K, 2 * pairs if job["growth"] == "double" else pairs + 1)


def train(overrides: dict[str, Any], device: str) -> dict[str, Any]:
    job = DEFAULTS | overrides
    torch.manual_seed(job["seed"])
    torch.set_num_threads(1)
    model = build(job).to(device)
    peak = job["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    task = MQAR(num_pairs=K, seed=job["seed"])
    validation = task.batch("validation", range(256)).to(device)
    pairs, running, solved, accuracy = next_pairs(job, 0, 1, 0.0), 0.0, None, 0.0
    for step in range(job["max_steps"]):
        batch = task.batch("train", range(step * BATCH, (step + 1) * BATCH), pairs).to(device)
        logits = model(batch.input_ids, logits_to_keep=pairs, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / job["max_steps"]))
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * cosine
        optimizer.step()
        optimizer.zero_grad()
        running = 0.8 * running + 0.2 * float((logits.argmax(-1) == batch.answers).float().mean())
        grown = next_pairs(job, step + 1, pairs, running)
        if grown != pairs:
            pairs, running = grown, 0.0
        if (step + 1) % 50 == 0:
            with torch.no_grad():
                guesses = model(validation.input_ids, logits_to_keep=K, use_cache=False).logits.argmax(-1)
            accuracy = float((guesses == validation.answers).float().mean())
            solved = step + 1 if solved is None and accuracy >= 0.99 else solved
    return {**overrides, "solved": solved, "accuracy": round(accuracy, 4), "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    jobs = [{**condition, "seed": seed} for seed in SEEDS for condition in CONDITIONS]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool, open(args.output, "w", encoding="utf-8") as file:
        for done, pending in enumerate([pool.apply_async(train, (job, args.device)) for job in jobs], start=1):
            line = json.dumps(pending.get())
            print(f"{done}/{len(jobs)} {line}", flush=True)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
