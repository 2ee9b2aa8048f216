"""One tiny model for all tests of the engine, and engines on it that are stopped at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, Faulty
from tests.kernels import FOLDER
from worker.engine.block_manager import BlockManager
from worker.engine.cpu.compiler import NO_COMPILER, CpuKernels, find_compiler
from worker.engine.cpu.cpu_runner import CpuRunner
from worker.engine.cpu.level import Level
from worker.engine.cpu.openmp import end_team
from worker.engine.engine import BatchEngine
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Scheduler
from worker.engine.torch.torch_runner import TorchRunner
from worker.engine.transformers.transformers_engine import TransformersEngine


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def engines(
    transformers_engines: Callable[..., TransformersEngine],
) -> Callable[..., TransformersEngine]:
    return transformers_engines


@pytest.fixture
def transformers_engines(model: Any) -> Iterator[Callable[..., TransformersEngine]]:
    """Makes started engines on the shared model, and stops them at the end."""
    made: list[TransformersEngine] = []

    def make(start: bool = True, **given: Any) -> TransformersEngine:
        engine = TransformersEngine(
            **{
                "model": model,
                "vocab_size": VOCAB,
                "max_batch": 32,
                "pad_token_id": 0,
                "context_length": 256,
                **given,
            }
        )
        made.append(engine)
        # As `build_engine`: what has just computed here keeps no threads from the engine.
        end_team()
        if start:
            engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop(timeout=20)
        assert engine._thread is None or not engine._thread.is_alive()


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The folder where all tests find the C kernels."""
    if find_compiler() is None:
        pytest.skip(NO_COMPILER)
    return FOLDER


@pytest.fixture
def batch_engines(model: Any, kernels: Path) -> Iterator[Callable[..., BatchEngine]]:
    """Makes started engines of our own, on copies of the model, and stops them at the end."""
    made: list[BatchEngine] = []

    def make(
        start: bool = True,
        *,
        model: Any = model,
        vocab_size: int = VOCAB,
        max_batch: int = 32,
        budget: int = 64,
        blocks: int = 128,
        threads: int = 2,
        prefix_cache: bool = True,
        kind: str = "cpu",  # or "torch", or a level of CPUs
        wrap: Callable[[ModelRunner], ModelRunner] = lambda runner: runner,
        **_: Any,
    ) -> BatchEngine:
        copied = copy.deepcopy(model)
        loaded: ModelRunner
        if kind != "torch":
            loaded = CpuRunner(
                copied,
                vocab_size=vocab_size,
                num_blocks=blocks,
                max_rows=max(budget, max_batch),
                max_sequences=max_batch,
                threads=threads,
                kernels=CpuKernels.here(kernels, None if kind == "cpu" else cast(Level, kind)),
            )
        else:
            loaded = TorchRunner(copied, vocab_size=vocab_size, num_blocks=blocks)
        loaded = wrap(loaded)
        manager = BlockManager(blocks, loaded.block_size, prefix_cache=prefix_cache)
        scheduler = Scheduler(manager, max_sequences=max_batch, budget=max(budget, max_batch))
        engine = BatchEngine(loaded, scheduler, 256)
        made.append(engine)
        # As `build_engine`: what has just computed here keeps no threads from the engine.
        end_team()
        if start:
            engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop(timeout=20)
        assert engine._thread is None or not engine._thread.is_alive()


@pytest.fixture
def engine(engines: Callable[..., TransformersEngine]) -> TransformersEngine:
    return engines()


@pytest.fixture
def faulty(model: Any, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(model, monkeypatch)
