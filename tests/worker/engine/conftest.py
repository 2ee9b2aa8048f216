"""One tiny model for all tests of the engine, and engines on it that are stopped at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, Faulty
from worker.engine.reference import GenerateEngine


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def engines(model: Any) -> Iterator[Callable[..., GenerateEngine]]:
    """Makes started engines on the shared model, and stops them at the end."""
    made: list[GenerateEngine] = []

    def make(start: bool = True, **given: Any) -> GenerateEngine:
        engine = GenerateEngine(
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
        if start:
            engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop(timeout=20)
        assert engine._thread is None or not engine._thread.is_alive()


@pytest.fixture
def engine(engines: Callable[..., GenerateEngine]) -> GenerateEngine:
    return engines()


@pytest.fixture
def faulty(model: Any, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(model, monkeypatch)
