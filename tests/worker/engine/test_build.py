"""Which engine a model gets, what is said about it, and how much memory it takes."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, ask, tokens
from worker.engine.build import EngineOptions, build_engine
from worker.engine.interface import Engine

GIB = 1 << 30


@pytest.fixture
def build(model: Any, kernels: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(
        given: Any = model, *, available: int = GIB, device: str = "cpu", **options: Any
    ) -> Engine:
        folder = options.pop("library_folder", kernels)
        engine = build_engine(
            copy.deepcopy(given),
            vocab_size=VOCAB,
            context_length=256,
            device=torch.device(device),
            available=available,
            library_folder=folder,
            options=EngineOptions(**options),
        )
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop()


def test_the_kernels_are_the_first_choice(
    build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = build(max_batch=5, budget=9, threads=1)
    assert engine.name == "cpu"
    said = caplog.records[-1].message
    assert "5 sequences at once, 9 rows a step, 1 threads" in said
    assert len(tokens(engine, ask())[0]) == 12


def test_without_a_compiler_plain_torch_computes_the_same(
    build: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = tokens(build(), ask(temperature=1.0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    engine = build(library_folder=tmp_path / "none")
    assert engine.name == "torch"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no C++ compiler" in warnings[0]
    assert "nightherd doctor" in warnings[0]
    assert tokens(engine, ask(temperature=1.0)) == wanted
    with pytest.raises(CheckpointError, match="kernels cannot be used"):
        build(kind="cpu", library_folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *((name, name) for name in ("cpu", "torch", "transformers")),
        *(("kernels", "cpu"), ("generate", "transformers")),
    ],
)
def test_each_setting_has_its_engine(setting: str, name: str, build: Callable[..., Engine]) -> None:
    """`kernels` and `generate` are old spellings."""
    engine = build(kind=setting)
    assert engine.name == name
    assert len(tokens(engine, ask())[0]) == 12


def test_the_engine_of_another_device_is_refused(build: Callable[..., Engine]) -> None:
    with pytest.raises(CheckpointError, match="cuda does not run on the device cpu"):
        build(kind="cuda")
    with pytest.raises(CheckpointError, match="cpu does not run on the device cuda:0"):
        build(kind="cpu", device="cuda:0")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"head_dim": 24}, "heads are of 24"), ({"hidden_size": 72, "head_dim": 32}, "its width, 72")],
)
def test_a_shape_that_the_kernels_lack(
    changes: dict[str, Any],
    reason: str,
    build: Callable[..., Engine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = build(tiny_llama(**changes))
    assert engine.name == "torch"
    assert reason in caplog.text
    assert len(tokens(engine, ask())[0]) == 12


def test_an_architecture_that_is_not_covered(
    build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 512, "n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    model.config.max_position_embeddings = 256
    engine = build(model)
    assert engine.name == "transformers"
    assert "gpt2" in caplog.text
    assert len(tokens(engine, ask())[0]) == 12
    with pytest.raises(CheckpointError, match="does not cover"):
        build(model, kind="cpu")


def test_a_window_of_attention_is_not_covered(
    build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    for window, name in ((64, "transformers"), (None, "cpu")):
        config = MistralConfig(**sizes, **heads, sliding_window=window)
        model: Any = MistralForCausalLM(config).eval()
        assert build(model).name == name


def test_memory_for_the_cache(
    build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    # 2 × 3 layers × 2 heads × 32 numbers × 4 bytes × 32 positions a block.
    block = 2 * 3 * 2 * 32 * 4 * 32
    caplog.set_level(logging.INFO)
    build(kv_memory=20 * block)
    assert "a KV cache of 640 tokens" in caplog.text
    build(available=40 * block)
    assert "a KV cache of 320 tokens" in caplog.text
    build(max_batch=3)
    assert "a KV cache of 768 tokens" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    build(kv_memory=3 * block)
    assert "fewer than the checkpoint's context of 256" in caplog.text


@pytest.mark.parametrize("options", [{"kv_memory": 1000}, {"kv_memory": 10**5, "context": 256}])
def test_too_little_memory_is_one_line(
    build: Callable[..., Engine], options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="give more with --kv-memory"):
        build(**options)


def test_memory_that_is_not_there_is_one_line(build: Callable[..., Engine]) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit: 1\.0 MiB is free; give less"):
        build(kv_memory=2 << 20, available=1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is taken as it is needed")
def test_memory_that_was_asked_for_is_taken_at_once(build: Callable[..., Engine]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 192 << 20
    build(max_batch=1000)
    before = resident()
    build(max_batch=1000)
    between = resident()
    build(max_batch=1000, kv_memory=size)
    assert between - before < size / 2
    assert resident() - between > size * 0.9


def test_a_smaller_context_is_kept(build: Callable[..., Engine]) -> None:
    engine = build(context=20)
    (future,) = engine.add(ask((3,) * 15, max_new_tokens=6)).futures
    assert future.result(20).error_code == "context_length_exceeded"
    assert len(tokens(engine, ask((3,) * 15, max_new_tokens=5))[0]) == 5


# The number type.


def test_what_was_bfloat16_for_the_kernels_is_float32_without_them(
    model: Any,
    build: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Plain torch and transformers take many times as long in bfloat16 on a CPU that lacks it."""
    narrow = copy.deepcopy(model).bfloat16()
    wanted = tokens(build(copy.deepcopy(narrow).float(), kind="torch"), ask())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with caplog.at_level(logging.INFO):
        for kind in ("auto", "transformers"):
            caplog.clear()
            engine = build(narrow, kind=kind, widen=True, library_folder=tmp_path / "none")
            assert "computes in float32" in caplog.text
            assert tokens(engine, ask()) == wanted
            with pytest.raises(CheckpointError, match=r"computes in float32, which takes .* more"):
                build(narrow, kind=kind, widen=True, available=1, library_folder=tmp_path / "none")
        caplog.clear()
        # Asked for, it stays.
        build(narrow, kind="torch")
    assert "computes in float32" not in caplog.text
