"""Cost of a training step (forward, backward, AdamW) relative to vanilla Qwen3, all models interleaved in one run.

    python benchmarks/train_step.py --hidden-size 64 --layers 8 --blocks 4

Prints, for each model, the median step time and its ratio to vanilla's. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR


def build_models(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    shape = {
        "vocab_size": 256,
        "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": args.hidden_size // 4,
        "max_position_embeddings": 3 * args.pairs,
        "tie_word_embeddings": False,
    }
    models: dict[str, PreTrainedModel] = {"vanilla": Qwen3ForCausalLM(Qwen3Config(**shape))}
    for source in ("cumulative", "block_sum"):
        config = AttnResConfig(**shape, attnres_num_blocks=args.blocks, attnres_source=source)
        models[source] = AttnResForCausalLM(config)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each model, after 5 that are not")
    args = parser.parse_args()
    torch.manual_seed(0)
    models = build_models(args)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    batch = MQAR(num_pairs=args.pairs).batch("train", range(args.batch_size))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5 + args.steps):
        for name, model in models.items():
            started = time.perf_counter()
            logits = model(batch.input_ids, logits_to_keep=args.pairs, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.perf_counter() - started)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"hidden {args.hidden_size}, {args.layers} layers, {args.blocks} blocks, batch {args.batch_size}, float32")
    vanilla = statistics.median(seconds["vanilla"][5:])
    for name, values in seconds.items():
        median = statistics.median(values[5:])
        print(f"{name:<12} {1000 * median:8.1f} ms  {median / vanilla:5.2f} x vanilla")


if __name__ == "__main__":
    main()
