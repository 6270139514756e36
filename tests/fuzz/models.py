"""Folders of models, checkpoints, and the returns of interventions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnres import Read
from probe import Examples, ProbeSettings, measure
from probe.ablation.base import Ablation, everywhere
from probe.files.checkpoints import load_model, read_lightning
from probe.runner import check_finite
from tests.fuzz.kind import Kind
from tests.fuzz.oracle import outcome, reading, untouched
from tests.fuzz.values import damaged, edited, json_texts
from tests.fuzz.world import TASK, World

BESIDE = ("config.json", "task.json", "attnres_run.json", "generation_config.json")
Tensors = tuple[tuple[str, int, int], ...]
TENSOR_EDITS = ("drop", "rename", "shape", "half", "double", "integer", "NaN", "infinite", "empty", "scalar", "swap")


@st.composite
def folders(draw: DrawFn, world: World) -> tuple[str, bytes | Tensors, bool]:
    """A file of an exported folder, what is in it, and whether its manifest stays."""
    name = draw(st.sampled_from((*BESIDE, "config.json", "config.json", "weights", "bytes", "index")))
    manifest = draw(st.integers(0, 4)) == 0
    if name == "weights":
        edit = st.tuples(st.sampled_from(TENSOR_EDITS), st.integers(0, 100), st.integers(0, 100))
        return name, tuple(draw(st.lists(edit, max_size=2))), manifest
    if name == "bytes":
        return name, damaged(draw, (world.run / "hf" / "model.safetensors").read_bytes()), manifest
    if name == "index":
        names = {"lm_head.weight": "model.safetensors", "x": "../../run/hf/model.safetensors"}
        return name, draw(json_texts(({"metadata": {}, "weight_map": names},))), manifest
    return name, draw(json_texts((json.loads((world.run / "hf" / name).read_text()),))), manifest


def changed_tensors(tensors: dict[str, Tensor], edits: Tensors) -> dict[str, Tensor]:
    tensors = dict(tensors)
    for edit, first, second in edits:
        names = sorted(tensors)
        if not names:
            break
        name, other = names[first % len(names)], names[second % len(names)]
        value = tensors[name].clone()
        match edit:
            case "drop":
                del tensors[name]
            case "rename":
                tensors[f"{name}.{second}"] = tensors.pop(name)
            case "shape":
                tensors[name] = value.flatten()[: max(value.numel() - 1, 1)].clone()
            case "half" | "double" | "integer":
                tensors[name] = value.to({"half": torch.float16, "double": torch.float64, "integer": torch.int64}[edit])
            case "NaN" | "infinite":
                value.flatten()[second % max(value.numel(), 1) :][:1] = float("nan" if edit == "NaN" else "inf")
                tensors[name] = value
            case "empty":
                tensors[name] = value.flatten()[:0].clone()
            case "scalar":
                tensors[name] = torch.tensor(1.0)
            case _:
                tensors[name], tensors[other] = tensors[other].clone(), value
    return tensors


def check_folder(world: World, drawn: tuple[str, bytes | Tensors, bool]) -> bool:
    name, content, manifest = drawn
    with world.copy_of("hf", manifests=manifest) as run:
        path = run / "hf" / {"index": "model.safetensors.index.json"}.get(name, name)
        if name in ("weights", "bytes"):
            path = run / "hf" / "model.safetensors"
        before = path.read_bytes() if path.exists() else None
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            save_file(changed_tensors(load_file(path), content), path, {"format": "pt"})
        same = before is not None and path.read_bytes() == before
        with untouched(run):
            found = outcome(reading(lambda: _usable(str(run))))
    if manifest and before is not None:
        assert found.accepted == same, f"altered, and used: {name}"
    if found.accepted:
        loaded = found.found[0]
        held = loaded.model.state_dict()
        assert all(bool(value.isfinite().all()) for value in held.values())
        assert (type(loaded.seed), type(loaded.step)) == (int, int)
    return found.accepted


def _usable(source: str) -> Any:
    found = load_model(source)
    check_finite(found.model)  # type: ignore[arg-type]
    return found


@st.composite
def checkpoints(draw: DrawFn, world: World) -> tuple[bytes | Any, bool]:
    """Damaged bytes, or what the checkpoint says beside its weights after edits; and whether the manifest stays."""
    path = world.run / "checkpoints" / "last.ckpt"
    if draw(st.booleans()):
        return damaged(draw, path.read_bytes()), draw(st.booleans())
    content = read_lightning(path)
    about = {name: value for name, value in content.items() if name in ABOUT}
    return edited(draw, about), draw(st.integers(0, 3)) == 0


ABOUT = ("hyper_parameters", "datamodule_hyper_parameters", "global_step", "epoch", "pytorch-lightning_version")


def check_checkpoint(world: World, drawn: tuple[bytes | Any, bool]) -> bool:
    content, manifest = drawn
    with world.copy_of("checkpoints/last.ckpt", manifests=manifest) as run:
        path = run / "checkpoints" / "last.ckpt"
        before = path.read_bytes()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            whole = {name: value for name, value in read_lightning(path).items() if name not in ABOUT}
            torch.save(whole | content, path.with_suffix(".new"))  # its tensors are mapped from the old one
            path.with_suffix(".new").replace(path)
        same = path.read_bytes() == before
        with untouched(run):
            found = outcome(reading(lambda: _usable(str(path))))
    if manifest:
        assert found.accepted == same, "altered, and used"
    return found.accepted


Returned = Callable[[Read], Any]
WEIGHTS: dict[str, Callable[[Tensor], Any]] = {
    "same": lambda w: w,
    "even": lambda w: torch.full_like(w, 1 / w.shape[-1]),
    "scaled": lambda w: 2 * w,
    "zero": torch.zeros_like,
    "row": lambda w: w[:1],
    "position": lambda w: w[:, :1],
    "source": lambda w: w[..., :1],
    "mean": lambda w: w.mean(),
    "none": lambda w: None,
    "double": lambda w: w.double(),
    "half": lambda w: w.half(),
    "integers": lambda w: w.long(),
    "booleans": lambda w: w > 0,
    "array": lambda w: w.numpy(),
    "list": lambda w: w.tolist(),
    "meta": lambda w: w.to("meta"),
    "negative": lambda w: -w,
    "NaN": lambda w: w * torch.nan,
    "infinite": lambda w: w / 0,
    "once NaN": lambda w: w.clone().index_fill_(0, torch.tensor([0]), torch.nan),
    "once negative": lambda w: w.clone().index_fill_(1, torch.tensor([0]), -1e-3),
    "more": lambda w: torch.cat((w, w), -1),
    "turned": lambda w: w.transpose(0, 1),
    "sparse": lambda w: w.to_sparse(),
    "complex": lambda w: w.to(torch.complex64),
    "unsqueezed": lambda w: w[None],
}
RIGHT = {"same", "even", "scaled", "zero"}
ACTS: dict[str, Callable[[Read], Any]] = {
    "everywhere": everywhere,
    "nowhere": lambda read: ~everywhere(read),
    "none": lambda read: None,
    "true": lambda read: True,
    "numbers": lambda read: everywhere(read).float(),
    "scalar": lambda read: torch.tensor(True),
    "per source": lambda read: read.routing_weights > 0,
    "row": lambda read: everywhere(read)[:1],
}
SHAPES: dict[str, Callable[[Read, Any], Any]] = {
    "pair": lambda read, acts: (read, acts),
    "list": lambda read, acts: [read, acts],
    "triple": lambda read, acts: (read, acts, acts),
    "read": lambda read, acts: read,
    "none": lambda read, acts: None,
    "plain": lambda read, acts: (tuple(read), acts),
    "text": lambda read, acts: "read",
}
SOURCES = ("all", "first", "fewer", "more", "as list", "none")


@st.composite
def returns(draw: DrawFn) -> tuple[str, str, str, str, str, bool]:
    """What an intervention returns: weights, which sources and how, positions, the whole; whether it is signed."""
    usually = st.integers(0, 2)
    shape = "pair" if draw(usually) else draw(st.sampled_from(sorted(SHAPES)))
    acts = "everywhere" if draw(usually) else draw(st.sampled_from(sorted(ACTS)))
    how = "same" if draw(usually) else draw(st.sampled_from(sorted(WEIGHTS)))
    which = draw(st.sampled_from(SOURCES))
    return draw(st.sampled_from(sorted(WEIGHTS))), which, how, acts, shape, draw(st.booleans())


def returned(drawn: tuple[str, str, str, str, str, bool]) -> Returned:
    weights, which, how, acts, shape, _ = drawn

    def ablated(read: Read) -> Any:
        sources: Any = tuple(WEIGHTS[how](v) if which == "all" or not i else v for i, v in enumerate(read.sources))
        if which in ("fewer", "more"):
            sources = sources[:-1] if which == "fewer" else (*sources, sources[0])
        elif which in ("as list", "none"):
            sources = list(sources) if which == "as list" else None
        new = read._replace(routing_weights=WEIGHTS[weights](read.routing_weights), sources=sources)
        return SHAPES[shape](new, ACTS[acts](read))

    return ablated


def is_right(drawn: tuple[str, str, str, str, str, bool]) -> bool:
    """Whether the contract allows it."""
    weights, which, how, acts, shape, signed = drawn
    if shape != "pair" or acts not in ("everywhere", "nowhere") or which not in ("all", "first"):
        return False
    layouts = RIGHT | {"negative", "NaN", "infinite", "once NaN", "once negative"}
    if weights not in layouts or how not in layouts:
        return False
    finite = RIGHT | {"negative", "once negative"}
    signs = RIGHT | (finite if signed else set())
    return acts == "nowhere" or (weights in signs and how in finite)


@contextmanager
def defined(drawn: tuple[str, str, str, str, str, bool]) -> Iterator[type[Ablation]]:
    """A kind of its own, known inside."""
    before, ablated = dict(Ablation.known), returned(drawn)
    fields = {"kind": "odd", "is_signed": drawn[-1], "ablated": lambda self, read: ablated(read)}
    try:
        yield type("Odd", (Ablation,), fields)
    finally:
        Ablation.known.clear()
        Ablation.known.update(before)


def check_return(world: World, drawn: tuple[str, str, str, str, str, bool]) -> bool:
    site = world.model.model.sites[-1]
    torch.manual_seed(0)
    sources = tuple(torch.randn(2, 5, 16) for _ in site.families)
    read = Read(site, torch.rand(2, 5, len(sources)) + 0.01, sources)
    with defined(drawn) as kind:
        ablation = kind((site.families[0],), frozenset([site.index]))

        def checked() -> Any:
            new, acts = ablation.outcome(read)
            ablation.check_values(read, new, acts)
            return new

        found = outcome(reading(checked))
    assert found.accepted == is_right(drawn), f"{'accepted' if found.accepted else found.line}: {drawn}"
    return found.accepted


EXAMPLES = Examples.from_batch(TASK.batch("probe", range(3)))


def check_probe_of_return(world: World, drawn: tuple[str, str, str, str, str, bool]) -> bool:
    settings = {"scopes": ["all"], "positions": ["all"], "sublayers": ["mlp"], "num_resamples": 20, "flip": False}
    with defined(drawn):
        asked = ProbeSettings(kinds=("odd",), families=("embedding", "older"), **settings)
        found = outcome(reading(lambda: measure(world.model, EXAMPLES, asked)))
    assert found.accepted == is_right(drawn), f"{'accepted' if found.accepted else found.line}: {drawn}"
    if found.accepted:
        rows = found.found[0].effects
        assert rows.loc[rows["applicable"], "effect"].notna().all()
    return found.accepted


IN_MODELS = (
    Kind("folders of models", lambda world: folders(world), check_folder, 30, 1_000),
    Kind("checkpoints", lambda world: checkpoints(world), check_checkpoint, 20, 300),
    Kind("returns of interventions", lambda world: returns(), check_return, 200, 15_000),
    Kind("probes of interventions", lambda world: returns(), check_probe_of_return, 20, 300),
)
__all__ = ["IN_MODELS"]
