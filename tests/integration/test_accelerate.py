"""accelerate: a model on one device works, one that is spread over several places is refused in one line."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_of_one_device(make_model, make_tokens, tmp_path, device_map):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    input_ids = make_tokens(model)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_offloading_is_refused(make_model, make_tokens, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    input_ids = make_tokens(model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    folder = tmp_path / "offload"
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=folder)
    with pytest.raises(ValueError, match="routing parameters are on several devices: a device_map must keep"):
        spread(input_ids)
    with pytest.raises(ValueError, match="routing parameters are on meta, inputs on cpu: offloading is not supported"):
        accelerate.cpu_offload(model)(input_ids)
