"""Matrices that are no plain ones: called as the quantiser left them, never joined by mistake."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, ask, tokens
from tests.worker.engine.cuda.test_cuda_runner import fake_capture
from tests.worker.engine.torch.test_torch_runner import generated
from worker.engine.block_manager import BlockManager
from worker.engine.build import EngineOptions, build_engine
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.kernels import reference
from worker.engine.engine import BatchEngine
from worker.engine.model.linears import joined
from worker.engine.model.weights import UnsupportedModelError, is_dense, shape_of
from worker.engine.scheduler import Scheduler
from worker.engine.torch.torch_runner import TorchRunner


class Int8Linear(torch.nn.Module):
    """Rows of int8 with a scale each; knows batches alone, as some quantisers' kernels."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        weight = plain.weight.data
        self.scales = torch.nn.Parameter(weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scales).round().to(torch.int8))
        self.bias = plain.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        assert rows.ndim == 3
        weight: Any = self.weight
        return functional.linear(rows, weight.float() * self.scales, self.bias)


class Subclass(torch.nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) * 0.5


class Packed(torch.Tensor):
    """A tensor that is another one than it seems, as torchao's are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is functional.linear:
            return out.as_subclass(torch.Tensor) * 0.5
        return out


def _int8(plain: torch.nn.Linear) -> torch.nn.Module:
    return Int8Linear(plain)


def _subclass(plain: torch.nn.Linear) -> torch.nn.Module:
    plain.__class__ = Subclass
    return plain


def _other_tensor(plain: torch.nn.Linear) -> torch.nn.Module:
    plain.weight = torch.nn.Parameter(plain.weight.data.as_subclass(Packed))
    return plain


def _other_forward(plain: torch.nn.Linear) -> torch.nn.Module:
    # As compressed-tensors does, which leaves the class.
    plain.forward = lambda input: functional.linear(input, plain.weight, plain.bias) * 0.5  # type: ignore[method-assign]
    return plain


def _hook(plain: torch.nn.Linear) -> torch.nn.Module:
    plain.register_forward_hook(lambda module, args, out: out * 0.5)
    return plain


def _scale(plain: torch.nn.Linear) -> torch.nn.Module:
    plain.register_buffer("scale", torch.ones(1))
    return plain


DISGUISES: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    "module": _int8,
    "subclass": _subclass,
    "tensor": _other_tensor,
    "forward": _other_forward,
    "hook": _hook,
}


def quantised(disguise: Callable[[torch.nn.Linear], torch.nn.Module], *names: str) -> Any:
    """A tiny LLaMA whose matrices of these names are quantised; all where none is named."""
    model = tiny_llama(attention_bias=True)
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and (not names or last in names):
            model.set_submodule(name, disguise(module))
    return model


def cuda_runner(model: Any) -> CudaRunner:
    runner = CudaRunner(
        model,
        kernels=reference,
        vocab_size=VOCAB,
        max_sequences=8,
        max_rows=64,
        context=256,
        capture=fake_capture,
    )
    runner.make_cache(40)
    return runner


def torch_runner(model: Any) -> TorchRunner:
    return TorchRunner(model, vocab_size=VOCAB, num_blocks=64)


def engine_tokens(runner: Any, count: int) -> list[tuple[int, ...]]:
    manager = BlockManager(runner.num_blocks, runner.block_size)
    separate_prefill = runner.name == "cuda"
    engine = BatchEngine(
        runner,
        Scheduler(manager, max_sequences=8, budget=64, separate_prefill=separate_prefill),
        256,
    )
    engine.start()
    try:
        return tokens(engine, *(ask(prompt, max_new_tokens=count) for prompt in PROMPTS[:3]))
    finally:
        engine.stop(timeout=20)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("make", [cuda_runner, torch_runner])
def test_quantised_linears_are_called_as_they_are(make: Any, disguise: str) -> None:
    model = quantised(DISGUISES[disguise])
    wanted = generated(model, PROMPTS[:3], 12)
    plain = generated(tiny_llama(attention_bias=True), PROMPTS[:3], 12)
    assert wanted != plain or disguise == "module"
    assert engine_tokens(make(model), 12) == [tuple(row) for row in wanted]


@pytest.mark.parametrize("make", [cuda_runner, torch_runner])
def test_some_of_them_quantised(make: Any) -> None:
    """Each of the joined ones alone, and the output layer plain: all that meet there stay apart."""
    model = quantised(_subclass, "k_proj", "up_proj", "down_proj")
    wanted = generated(model, PROMPTS[:3], 12)
    assert engine_tokens(make(model), 12) == [tuple(row) for row in wanted]


def test_what_is_a_plain_matrix() -> None:
    def fresh() -> torch.nn.Linear:
        return torch.nn.Linear(4, 4)

    assert is_dense(fresh())
    assert is_dense(copy.deepcopy(fresh()))
    assert is_dense(fresh().bfloat16())
    # What is left where something was put around a module and taken away.
    same = fresh()
    same.forward = type(same).forward.__get__(same)  # type: ignore[method-assign]
    assert is_dense(same)
    assert not is_dense(fresh().to(torch.float8_e4m3fn))
    for disguise in (*DISGUISES.values(), _scale):
        assert not is_dense(disguise(fresh()))


def test_joined_ones_leave_nothing_behind() -> None:
    parts = [torch.nn.Linear(4, size, bias=size != 2) for size in (2, 3)]
    rows = torch.randn(5, 4)
    with torch.no_grad():
        wanted = torch.cat([part(rows) for part in parts], dim=1)
        linear = joined(parts, lambda weight, bias: lambda rows: rows @ weight.T + bias)
        assert torch.allclose(linear(rows), wanted, atol=1e-6)
    assert not sum(parameter.numel() for part in parts for parameter in part.parameters())


def test_a_quantised_embedding_is_not_covered() -> None:
    model = tiny_llama()
    model.model.embed_tokens.register_buffer("scale", torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="embedding is quantised"):
        shape_of(model)


def test_the_kernels_for_cpus_refuse_them_and_torch_computes(
    kernels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(kind: Any) -> Any:
        return build_engine(
            quantised(_int8, "v_proj"),
            vocab_size=VOCAB,
            context_length=256,
            device=torch.device("cpu"),
            available=1 << 30,
            library_folder=kernels,
            options=EngineOptions(kind=kind),
        )

    wanted = generated(quantised(_int8, "v_proj"), PROMPTS[:1], 12)
    engine = build("auto")
    assert engine.name == "torch"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "model.layers.0.self_attn.v_proj, a Int8Linear, is quantised" in warnings[0]
    engine.start()
    try:
        assert tokens(engine, ask(PROMPTS[0], max_new_tokens=12)) == [tuple(wanted[0])]
    finally:
        engine.stop()
    with pytest.raises(CheckpointError, match="is quantised"):
        build("cpu")
