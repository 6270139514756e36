"""How tests/fixtures/pointer was made: a small AttnRes model that reads a memory of four cells at an address.

python -m tests.support.train_pointer        # half a minute
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import Pointer
from tests.support.paths import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "pointer"
TASK = Pointer(address_bits=2, vocab_size=11)
BATCH, MOST_STEPS, SOLVED = 32, 2000, 0.9995


def train() -> AttnResForCausalLM:
    """With a curriculum over the bits; to an accuracy of `SOLVED`, as a running mean."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attnres_num_blocks": 2}
    sizes = {"vocab_size": TASK.vocab_size, "max_position_embeddings": TASK.num_tokens}
    model = AttnResForCausalLM(AttnResConfig(**shape, **sizes, bos_token_id=None, eos_token_id=None))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    accuracy, size = 0.0, 1
    for step in range(MOST_STEPS):
        batch = TASK.batch("train", range(step * BATCH, (step + 1) * BATCH), size)
        answers = batch.labels[:, batch.query_positions]
        logits = model(batch.input_ids, logits_to_keep=batch.query_positions, use_cache=False).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracy = 0.95 * accuracy + 0.05 * float((logits.argmax(-1) == answers).float().mean())
        if accuracy > 0.97 and size < TASK.size:
            accuracy, size = 0.0, size + 1
        elif accuracy > SOLVED:
            break
    return model.eval()


def main() -> None:
    model = train()
    model.to(torch.bfloat16).save_pretrained(FOLDER)  # type: ignore[arg-type]
    files = {"task.json": TASK.to_dict(), "attnres_run.json": {"condition": "cumulative", "seed": 0, "step": 0}}
    for name, content in files.items():
        Path(FOLDER, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
