"""Where heads look: the weight from the position that asks to that of the answer's value in the context."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probe.examples.examples import Examples
from probe.trace.attention import Asking
from probe.trace.stack import Run, Stack

KEYS_AT_ONCE = 2**24
"""Numbers of keys that are held for the queries of a part: 64 MiB in float32."""


def value_places(examples: Examples) -> np.ndarray:
    """(answers, 3): sequence, the position that asks for the answer, and that where its tokens begin in the context.

    Left out are answers whose tokens stand nowhere before the position that asks, or at several places.
    """
    ids, labels = examples.input_ids.cpu().numpy(), examples.labels.cpu().numpy()
    sequences, positions = examples.queries.cpu().numpy().nonzero()
    found = []
    for rows in examples.answer_rows.cpu().numpy():
        rows = rows[rows >= 0]
        sequence, asked = sequences[rows[0]], positions[rows[0]]
        tokens = labels[sequence, positions[rows]]
        if asked < len(tokens):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids[sequence, :asked], len(tokens))
        (places,) = (windows == tokens).all(1).nonzero()
        if len(places) == 1:
            found.append((sequence, asked, places[0]))
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def attention_to_value(stack: Stack, run: Run, examples: Examples) -> np.ndarray:
    """(layers, heads, sequences) weight to the value, mean over a sequence's answers that `value_places` knows.

    NaN where it knows none. Weights are the softmax of the clean run's queries and keys, as "eager" attention has them,
    whatever implementation the model runs with.

    Args:
        run: the clean run of `examples`.
    """
    places = torch.from_numpy(value_places(examples)).to(examples.input_ids.device)
    counts = torch.bincount(places[:, 0], minlength=len(examples))
    weights = [_weights(stack, run, layer, places) for layer in range(len(run.keys))]
    answers = torch.stack(weights).cpu().double()  # (layers, heads, answers)
    sums = answers.new_zeros(*answers.shape[:2], len(examples)).index_add_(2, places[:, 0].cpu(), answers)
    return (sums / counts.cpu()).numpy()


def _weights(stack: Stack, run: Run, layer: int, places: Tensor) -> Tensor:
    """(heads, answers) of one layer."""
    heads = stack.model.config.num_attention_heads
    _, _, length, size = run.keys[layer].shape
    found = [places.new_zeros((0, heads), dtype=torch.float32)]
    for part in places.split(max(1, KEYS_AT_ONCE // (heads * length * size))) if len(places) else ():
        sequence, asked, value = part.unbind(1)
        weights = Asking.of(stack, run, layer, sequence, asked).weights()  # (K, heads, T)
        found.append(weights.gather(2, value.view(-1, 1, 1).expand(-1, heads, 1)).squeeze(2))
    return torch.cat(found).T
