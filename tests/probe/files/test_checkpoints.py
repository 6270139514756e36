"""What is loaded as a model: safetensors inside their folder, whole checkpoints, and no code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnres.tasks import MQAR
from probe.files.checkpoints import load_model, read_lightning

TASK = MQAR(num_pairs=4, vocab_size=40)


@pytest.fixture
def exported(make_model, tmp_path) -> Path:
    folder = tmp_path / "hf"
    make_model().save_pretrained(folder)
    return folder


def refuses(source: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(source))
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_pickle_is_refused_by_name(exported, tmp_path, name):
    (exported / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), exported / name)
    refuses(exported, rf"{exported / name} is a pickle, .* convert the folder by from_pretrained\(FOLDER\)")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_not_read(exported, tmp_path):
    torch.save(Bomb(tmp_path / "ran"), exported / "pytorch_model.bin")
    load_model(str(exported))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3])
def test_an_index_stays_in_its_folder(exported, name):
    weights = exported / "model.safetensors"
    shutil.copy(weights, exported.parent / "outside.safetensors")
    weights.rename(exported / "model-00001-of-00001.safetensors")
    with safe_open(exported / "model-00001-of-00001.safetensors", "pt") as file:
        names = list(file.keys())
    index = exported / "model.safetensors.index.json"
    inside = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    index.write_text(json.dumps(inside))
    load_model(str(exported))
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    refuses(exported, r"index.json names .*, which is no safetensors file of ")
    for key in inside:
        index.write_text(json.dumps({key: inside[key]}))
        refuses(exported, "must hold metadata and a weight_map")


def test_no_code_of_a_folder_is_run(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    (exported / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    for model_type in ("qwen3_attnres", "somebodys"):
        names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Model")
        (exported / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
        if model_type == "somebodys":
            refuses(exported, "config.json is unreadable")
        else:
            load_model(str(exported))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_refused(exported):
    (exported / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../other"}))
    refuses(exported, "is an adapter: merge it")


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    """As attnres-train writes them, as far as a probe reads."""
    model = make_model()
    content = {
        "hyper_parameters": {"model_config": model.config.to_dict(), "condition": "frozen", "seed": 7},
        "datamodule_hyper_parameters": {"task": TASK.to_dict()},
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "global_step": 12,
    }
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    return path


def test_a_checkpoint_is_loaded_as_it_is(checkpoint, make_model):
    found = load_model(str(checkpoint))
    assert (found.run, found.condition, found.seed, found.step, found.task) == ("run", "frozen", 7, 12, TASK)
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())


def test_a_byte_flipped_in_a_checkpoint_is_found_without_a_manifest(checkpoint, make_model):
    """Unless it is one of those between the files of the archive, which nobody reads."""
    whole, expected, refused = bytearray(checkpoint.read_bytes()), make_model().state_dict(), 0
    for place in range(len(whole) // 40, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        checkpoint.write_bytes(flipped)
        try:
            state = load_model(str(checkpoint)).model.state_dict()
        except ValueError as error:
            assert re.search("is not a checkpoint of attnres-train .*, or not a whole one", str(error))  # noqa: PT017
            refused += 1
        else:
            assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert refused > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["state_dict"].popitem(), "does not fit the model that it names: .* is nothing, not"),
        (
            lambda content: content["state_dict"].update({"model.lm_head.weight": torch.zeros(2, 3)}),
            r"lm_head.weight is \[2, 3\], not \[40, ",
        ),
        (lambda content: content.update(state_dict=[]), "or not a whole one"),
        (lambda content: content.update(global_step="many"), "or not a whole one"),
        (lambda content: content["hyper_parameters"].update(model_config=[]), "or not a whole one"),
        (
            lambda content: content["hyper_parameters"]["model_config"].update(attnres_source="no"),
            "holds no model of this version",
        ),
        (lambda content: content["hyper_parameters"]["model_config"].update(model_type="no"), "holds no model of this"),
    ],
)
def test_what_a_checkpoint_lacks_is_said_in_a_line(checkpoint, change, message):
    content = read_lightning(checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)
    refuses(checkpoint, message)


def test_torn_safetensors_are_named(exported):
    save_file({"a": torch.zeros(1)}, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        load_model(str(exported))
