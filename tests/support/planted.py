"""Models whose depth-routing mechanism is known by construction: weights set by hand, so a probe can be graded.

All but `zero_mean` solve MQAR (8 pairs, vocabulary 40) in two attention steps, and nothing else writes:

- *bind*: a head that looks one position back (by rotary phase) writes the previous token's code into slice P;
- *look up*: a head whose query is the token's own code and whose key is P finds the value that followed the queried
  key in the context, and writes its code into slice OUT, which the output head reads.

Slices of the hidden state: C a constant 1; R the token's one-hot code (from the embedding); W a copy of it that some
sublayer writes; P the previous token's code; OUT the output; J junk; M markers that pseudo-queries point at. Queries
and keys are normed per head, so only *which* content a read holds matters, not how much of it: an ablation either
leaves the mechanism alone or breaks it. Values scale with 1 / rms of a read, which is the same for every token; the
output is `LOUD`, so that the last norm undoes that, and the margin stays where it is unless the mechanism breaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR

TASK = MQAR(num_pairs=8, vocab_size=40)
V = TASK.vocab_size
C, M0, M1 = 0, 1, 2
R, W, P, OUT, J = (slice(3 + i * V, 3 + (i + 1) * V) for i in range(5))
HIDDEN = 3 + 5 * V + 1
HEAD = 128
THETA = 1e6
FAST = range(6)  # rotary pairs that turn by 0.3 to 1 rad per position: for looking at a distance
SLOW = 24  # pairs from here on turn by less than 0.006 rad per position: for content
SHARP = 3.5  # gain of the query and key norms
LOUD = 10.0  # times the code that is looked up: against all else that the last norm sees


@dataclass(frozen=True)
class Planted:
    """A model, and the (family, sublayer, region) whose masking breaks it: those and no others."""

    model: AttnResForCausalLM
    sites: frozenset[tuple[str, str, str]]
    task: MQAR = TASK


def blank(source: str, num_blocks: int, num_layers: int = 6, **fields) -> AttnResForCausalLM:
    """A model in which no sublayer writes, with codes at its input and OUT at its output."""
    shape = {"vocab_size": V, "hidden_size": HIDDEN, "intermediate_size": 2 * V, "num_hidden_layers": num_layers}
    shape |= {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": HEAD, "tie_word_embeddings": False}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "max_position_embeddings": 64}
    config = AttnResConfig(**(shape | {"attnres_source": source, "attnres_num_blocks": num_blocks} | fields))
    model = AttnResForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.zero_()
        if "q_norm" in name or "k_norm" in name:
            parameter.fill_(SHARP)
    return model


def solver(source: str, num_blocks: int) -> AttnResForCausalLM:
    model = blank(source, num_blocks)
    model.model.embed_tokens.weight[:, C] = 1
    model.model.embed_tokens.weight[:, R] = torch.eye(V)
    model.lm_head.weight[V // 2 :, OUT] = 1.2 * torch.eye(V)[V // 2 :]  # values only; a gap of about 15 nats
    generator = torch.Generator().manual_seed(0)
    for code in (R, W, P):  # what codes other than OUT say is noise: effects differ from sequence to sequence
        model.lm_head.weight[:, code] = 0.1 * torch.randn(V, V, generator=generator)
    return model


def look_back(model: AttnResForCausalLM, layer: int, head: int, distance: int) -> None:
    """Make a head attend to the position `distance` before, whatever is there."""
    attention = model.model.layers[layer].self_attn
    for pair in FAST:
        angle = distance * THETA ** (-2 * pair / HEAD)
        attention.q_proj.weight[head * HEAD + pair, C] = 1
        attention.k_proj.weight[head * HEAD + pair, C] = math.cos(angle)
        attention.k_proj.weight[head * HEAD + pair + HEAD // 2, C] = math.sin(angle)


def move(model: AttnResForCausalLM, layer: int, head: int, source: slice, target: slice, amount: float) -> None:
    """Add `amount` of what the head finds in `source` (after the input norm) to `target`."""
    attention, width = model.model.layers[layer].self_attn, len(range(*source.indices(HIDDEN)))
    attention.v_proj.weight[head * HEAD : head * HEAD + width, source] = torch.eye(width)
    attention.o_proj.weight[target, head * HEAD : head * HEAD + width] += amount * torch.eye(width)


def look_up(
    model: AttnResForCausalLM, layer: int, code: slice, key: slice = P, target: slice = OUT, head=0, amount=LOUD
) -> None:
    """Make a head match the own `code` with what `key` holds, and write the `code` that it finds there to `target`."""
    attention, rows = model.model.layers[layer].self_attn, slice(head * HEAD + SLOW, head * HEAD + SLOW + V)
    attention.q_proj.weight[rows, code] = torch.eye(V)
    attention.k_proj.weight[rows, key] = torch.eye(V)
    move(model, layer, head, code, target, amount)


def copy_by_mlp(model: AttnResForCausalLM, layer: int, moves: list[tuple[slice, slice, float]], read: Tensor) -> None:
    """Make an MLP add `amount` of (source, target), exactly so at a read that looks like `read` (hidden,)."""
    mlp, normed, row = model.model.layers[layer].mlp, read / rms(read), 0
    gate = silu(normed[C])  # open by the constant alone, so that the MLP is linear
    for source, target, amount in moves:
        width = len(range(*source.indices(HIDDEN)))
        rows, row = slice(row, row + width), row + width
        mlp.gate_proj.weight[rows, C] = 1
        mlp.up_proj.weight[rows, source] = torch.eye(width)
        mlp.down_proj.weight[target, rows] = amount * rms(read) / gate * torch.eye(width)


def route(
    model: AttnResForCausalLM, layer: int, sublayer: str, query: dict[int, float] | None = None, bias=0.0
) -> None:
    """Set a read's pseudo-query and recency bias."""
    owner, prefix = model.model.layers[layer], {"self_attn": "attn", "mlp": "mlp"}[sublayer]
    getattr(owner, f"{prefix}_res_bias").fill_(bias)
    for dim, value in (query or {}).items():
        getattr(owner, f"{prefix}_res_proj").weight[0, dim] = value


def state(*, hidden: int = HIDDEN, **slices: float) -> Tensor:
    """A hidden state with these amounts of C, M0, M1 and one entry each of R, W, P, J."""
    value = torch.zeros(hidden)
    for name, amount in slices.items():
        where = {"C": C, "M0": M0, "M1": M1, "R": R, "W": W, "P": P, "J": J}[name]
        value[where if isinstance(where, int) else where.start] = amount
    return value


def rms(value: Tensor) -> float:
    return float((value.square().mean() + 1e-6).sqrt())


def dim(index: int) -> slice:
    return slice(index, index + 1)


def embedding_to_early_mlp() -> Planted:
    """Layer 0 attention binds, and erases R from the stream; layer 0's MLP must take R from the embedding to write W.

    Look-up (layer 3) uses W, which the newest block and the stream both hold.
    """
    model = solver("cumulative", num_blocks=3)
    scale = rms(state(C=1, R=1))
    look_back(model, 0, 0, 1)
    move(model, 0, 0, R, P, scale)
    look_back(model, 0, 1, 0)
    move(model, 0, 1, R, R, -scale)
    for layer in (0, 1):
        route(model, layer, "mlp", bias=math.log(0.15 / 0.85))
    copy_by_mlp(model, 0, [(R, W, 1 / 0.85)], state(C=1, R=0.85, P=0.15))
    look_up(model, 3, W)
    return Planted(model, frozenset({("embedding", "mlp", "early")}))


def older_to_late_attention() -> Planted:
    """Layer 0 binds and marks; layer 3's MLP erases P and the mark, so that only older blocks hold P for layer 4."""
    model = solver("cumulative", num_blocks=6)
    scale = rms(state(C=1, R=1))
    look_back(model, 0, 0, 1)
    move(model, 0, 0, R, P, scale)
    look_back(model, 0, 1, 0)
    move(model, 0, 1, dim(C), dim(M1), scale)
    read = state(C=1, R=1, P=0.8, M1=0.8)  # even weights on the embedding, three blocks that hold P, and the stream
    copy_by_mlp(model, 3, [(P, P, -1 / 0.8), (dim(M1), dim(M1), -1 / 0.8)], read)
    logit = math.log(0.85 / 0.15)  # three marked sources against three unmarked
    for layer in (4, 5):
        route(model, layer, "self_attn", {M1: logit * rms(state(C=1, R=1, P=1, M1=1))})
    look_up(model, 4, R)
    return Planted(model, frozenset({("older", "self_attn", "late")}))


def saturated() -> Planted:
    """A margin of 18 nats, of which older -> late attention is worth a tenth: NLL is below 1e-4 without it, too.

    As `older_to_late_attention`, but layer 0 binds twice, and only one of the two codes is erased from the stream. Of
    two heads of one read, the first needs the other code, which all sources hold, and writes the output; the second
    needs the erased one, and writes half as much into J, which the output head reads as well.
    """
    found = older_to_late_attention()
    model, scale = found.model, rms(state(C=1, R=1))
    look_back(model, 0, 2, 1)
    move(model, 0, 2, R, W, scale)
    model.model.layers[3].mlp.down_proj.weight.zero_()
    read = state(C=1, R=1, P=0.8, W=0.8, M1=0.8)
    copy_by_mlp(model, 3, [(P, P, -1 / 0.8), (dim(M1), dim(M1), -1 / 0.8)], read)
    for projection in ("v_proj", "o_proj"):
        getattr(model.model.layers[4].self_attn, projection).weight.zero_()
    look_up(model, 4, R, key=P, target=J, amount=LOUD / 2)
    look_up(model, 4, R, key=W, target=OUT, head=1)
    model.lm_head.weight[V // 2 :, J] = 0.47 * 1.2 * torch.eye(V)[V // 2 :]
    return found


def degenerate_cells() -> Planted:
    """`older_to_late_attention`, and a late MLP that acts in hardly any sequence: where one key has one certain value.

    It multiplies the queried key's code with that of the value that was found, and writes against it into J. Effects
    of masking at late MLPs are made by a few of 64 sequences.
    """
    found = older_to_late_attention()
    mlp = found.model.model.layers[5].mlp
    found.model.lm_head.weight[V // 2 :, J] = -torch.eye(V)[V // 2 :]
    mlp.gate_proj.weight[0, R.start] = 1
    mlp.up_proj.weight[0, OUT.start + V // 2] = 1
    mlp.down_proj.weight[J.start + V // 2, 0] = 3.0
    return found


def mass_without_role() -> Planted:
    """Block sums: block 0 holds P and W, block 1 holds junk, and late attention puts 45 % of its mass on the junk.

    What late attention needs is older (a family that exists in one region only); prev_completed has no role.
    """
    model = solver("block_sum", num_blocks=3)
    scale = rms(state(C=1, R=1))
    look_back(model, 0, 0, 1)
    move(model, 0, 0, R, P, scale)
    look_back(model, 0, 1, 0)
    move(model, 0, 1, R, W, scale)
    look_back(model, 0, 2, 0)
    move(model, 0, 2, dim(C), dim(M0), scale)
    look_back(model, 2, 0, 1)
    move(model, 2, 0, W, J, 0.2)
    look_back(model, 2, 1, 0)
    move(model, 2, 1, dim(M0), dim(M1), 0.2)
    marked, junk = state(P=1, W=1, M0=1), state(J=1, M1=1)
    for layer in (2, 3):
        route(model, layer, "self_attn", {M0: math.log(2.0) * rms(marked)})
    for layer in (4, 5):
        query = {M0: math.log(5.0) * rms(marked), M1: math.log(5.0) * rms(junk)}  # embedding 1 : older 5 : prev 5
        route(model, layer, "self_attn", query)
    look_up(model, 4, W)
    return Planted(model, frozenset({("older", "self_attn", "late")}))


def redundant_pair() -> Planted:
    """Layer 2 binds and marks; late attention (layer 5) finds P in the newest block and in the stream alike."""
    model = solver("cumulative", num_blocks=3)
    scale = rms(state(C=1, R=1))
    look_back(model, 2, 0, 1)
    move(model, 2, 0, R, P, scale)
    look_back(model, 2, 1, 0)
    move(model, 2, 1, dim(C), dim(M1), scale)
    for layer in (4, 5):
        route(model, layer, "self_attn", {M1: math.log(9.0) * rms(state(C=1, R=1, P=1, M1=1))})
    look_up(model, 5, R)
    return Planted(model, frozenset())


def redundant_blocks() -> Planted:
    """Block sums, which share no content: blocks 0 and 1 both bind, and late attention needs either of them."""
    model = solver("block_sum", num_blocks=3)
    for layer, weight in ((0, 1.0), (2, 0.5)):  # of the embedding, in its read
        scale = rms(state(C=1, R=1)) if layer == 0 else rms(state(C=0.5, R=0.5, P=0.5, W=0.5)) / weight
        look_back(model, layer, 0, 1)
        move(model, layer, 0, R, P, scale)
        look_back(model, layer, 1, 0)
        move(model, layer, 1, R, W, scale)
    look_up(model, 4, W)
    return Planted(model, frozenset())


def zero_mean(seed: int, strength: float = 1.5) -> Planted:
    """Not a solver: an MLP (middle or late, by seed) tilts the logits by a sign that it reads from the embedding.

    Each token has two signs, a and b, and the stream holds b where the embedding holds a. Masking the embedding tilts
    by b instead: answers of class +1 become more probable or less, those of class -1 the other way round. Classes are
    balanced and independent of the keys, so the effects, large for many queries, have mean zero exactly.
    """
    hidden, signs_a, signs_b, s, tilt, constant = 8, 2, 3, 1, 4, 100.0
    task = MQAR(num_pairs=8, vocab_size=V, seed=seed)
    model = blank("cumulative", 1, 3, hidden_size=hidden, intermediate_size=4, num_attention_heads=1,
                  num_key_value_heads=1, head_dim=4)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 2, (V,), generator=generator) * 2.0 - 1 for _ in range(2)]
    embedding = model.model.embed_tokens.weight
    embedding[:, 0], embedding[:, s], embedding[:, signs_a], embedding[:, signs_b] = constant, draw[0], *draw
    unit = math.sqrt(hidden)  # of the constant, after any norm: it outweighs everything else

    swap = model.model.layers[0].mlp  # stream: a becomes b
    swap.gate_proj.weight[0, 0] = 10 / unit
    swap.up_proj.weight[0, [signs_b, signs_a]] = torch.tensor([1.0, -1.0])
    swap.down_proj.weight[s, 0] = constant / unit / 10

    layer = 1 + int(torch.randint(0, 2, (1,), generator=generator))
    reader = model.model.layers[layer].mlp  # relu(3 x + 1) - relu(3 x - 1) - 1 is the sign of x for |x| > 1/3
    slope = 30.0
    for row, offset in ((0, 1.0), (1, -1.0)):
        reader.gate_proj.weight[row, [s, 0]] = torch.tensor([3 * constant, offset]) * slope / unit
        reader.down_proj.weight[tilt, row] = offset * strength / slope
    reader.gate_proj.weight[2, 0] = slope / unit
    reader.down_proj.weight[tilt, 2] = -strength / slope
    reader.up_proj.weight[:3, 0] = 1 / unit
    for each in range(3):
        route(model, each, "mlp", bias=math.log(0.15 / 0.85))

    classes = (torch.arange(V // 2) % 2 * 2.0 - 1)[torch.randperm(V // 2, generator=generator)]
    model.lm_head.weight[:, 0] = torch.where(torch.arange(V) < V // 2, -20.0, 20.0) / unit
    model.lm_head.weight[V // 2 :, tilt] = classes * constant / unit
    return Planted(model, frozenset(), task)
