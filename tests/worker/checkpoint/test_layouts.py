"""Every generation of LLaMA, in the files that people have: the same logits as the source model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nightherd.catalogue import checkpoint_key
from tests.layouts import LAYOUTS, source_model, write_layout
from worker.checkpoint.load import load_model, open_checkpoint
from worker.checkpoint.report import check

TOKENS = torch.tensor([[0, *range(3, 123)]])
"""Longer than the original context of the layouts whose rotary waves are stretched."""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_logits(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    source = write_layout(folder, name)
    opened = open_checkpoint(
        checkpoint_key(str(folder)), device="cpu", dtype="float32", home=tmp_path
    )
    assert torch.equal(logits(opened.model.model), logits(source))
    assert opened.text.has_chat_template == LAYOUTS[name].template
    assert opened.text.context_length == LAYOUTS[name].config["max_position_embeddings"]
    prompt = opened.text.encode("the ship", True)
    assert prompt[0] == opened.text.bos_token_id
    assert opened.text.decode(prompt) == "the ship"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-3", {"rope_theta": 10000.0}),
        ("llama-3.1", {"rope_scaling": None}),
        ("code-llama", {"rope_theta": 10000.0}),
    ],
)
def test_the_rotary_settings_are_obeyed(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    folder = tmp_path / name
    source = write_layout(folder, name)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    changed = load_model(folder, "cpu", "float32").model
    assert not torch.allclose(logits(changed), logits(source), atol=1e-3)


@pytest.mark.parametrize("name", ["llama-2", "llama-3.2"])
def test_what_the_report_counts_is_what_is_loaded(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    write_layout(folder, name)
    report = check(str(folder), home=tmp_path, device="cpu", dtype="bfloat16", sequences=3)
    layout = LAYOUTS[name]
    parameters = sum(one.numel() for one in source_model(layout).parameters())
    assert report.problems == []
    assert (report.found, report.path, report.commit) == ("folder", folder, None)
    assert (report.architecture, report.model_type) == ("LlamaForCausalLM", "llama")
    assert (report.parameters, report.stored_dtype) == (parameters, "F32")
    assert report.memory is not None
    assert report.memory.weights == 2 * parameters
    # Keys and values × layers × KV heads × head size × bytes of bfloat16.
    assert report.memory.per_token == 2 * 2 * layout.kv_heads * 32 * 2
    assert report.memory.cache == 3 * report.memory.per_token * report.memory.context
    assert report.memory.fits
    assert json.loads(json.dumps(report.as_json()))["ok"] is True
