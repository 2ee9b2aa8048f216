"""Loading straight to a card, and what quantised checkpoints need, without card or quantiser."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama, write_checkpoint
from worker.checkpoint import load, memory, quantization
from worker.checkpoint.files import Weights
from worker.checkpoint.load import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


class Loading:
    """Stands in for transformers' loading, on a card that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, accelerate: bool) -> None:
        self.said: dict[str, Any] = {}
        self.moved: list[torch.device] = []
        self.passes: list[tuple[int, ...]] = []
        self.model = SimpleNamespace(eval=lambda: None, to=self.moved.append)
        monkeypatch.setattr(load, "resolve_device", lambda wanted: torch.device(wanted))
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", self.load)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (10**9, 10**9))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (accelerate or None) if name == "accelerate" else found(name),
        )

    def load(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.said = kwargs
        return self.model, {}


def test_weights_go_straight_to_a_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = torch.device("cuda:0")
    straight = Loading(monkeypatch, accelerate=True)
    # Less than the weights take: they are never there at once.
    with monkeypatch.context() as patched:
        patched.setattr(memory, "machine_memory", lambda: (10**6, 10**9))
        assert load_model(folder, "cuda:0", "float32").device == card
    assert straight.said["device_map"] == {"": card}
    assert not straight.moved
    assert not caplog.records

    around = Loading(monkeypatch, accelerate=False)
    load_model(folder, "cuda:0", "float32")
    assert "device_map" not in around.said
    assert around.moved == [card]
    assert [record.message.endswith("pip install accelerate") for record in caplog.records] == [
        True
    ]


def test_a_quantised_model_is_ready_when_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compressed-tensors, whose weights are unpacked in the first pass through the model."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "any"}
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = tiny_llama()
    unpacked = []
    model.register_forward_pre_hook(lambda module, args: unpacked.append(args[0].shape))
    loading = Loading(monkeypatch, accelerate=False)
    loading.model = model
    load_model(folder, "cpu", "float32")
    assert unpacked == [(1, 2)]

    def break_(*args: Any) -> None:
        raise ImportError("no kernel for this card\n install it")

    model.lm_head.forward = break_
    with pytest.raises(
        CheckpointError, match="cannot be loaded: no kernel for this card"
    ) as caught:
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(caught.value)


def test_what_quantised_checkpoints_need(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(quantization, "_installed", lambda module: False)
    assert quantization.missing_packages("compressed-tensors") == ["compressed-tensors"]
    assert quantization.missing_packages("awq") == ["gptqmodel", "accelerate"]
    for capability, packages in (((9, 0), ["accelerate", "kernels"]), ((8, 0), ["accelerate"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place, it=capability: it)
        assert quantization.missing_packages("fp8", card) == packages
    assert quantization.missing_packages("fp8", cpu) == ["accelerate"]
    # compressed-tensors as it is where the card computes in FP8, else plain.
    groups = {"g": {"weights": {"type": "float", "num_bits": 8}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    assert not quantization.is_unpacked({"quantization_config": said}, card)
    assert quantization.is_unpacked({"quantization_config": said}, cpu)
    four = {**said, "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}}
    assert quantization.is_unpacked({"quantization_config": four}, card)
    packed = Weights({"I32": 1000})
    assert (
        memory.weights_bytes(packed, {"quantization_config": four}, torch.bfloat16, card) == 16000
    )
    # Made bfloat16 where nothing computes in FP8, which takes twice as much.
    stored = Weights({"F8_E4M3": 1000})
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    assert memory.weights_bytes(stored, fp8, torch.bfloat16, cpu) == 2000
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    assert memory.weights_bytes(stored, fp8, torch.bfloat16, card) == 1000
