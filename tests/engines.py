"""Requests, prompts and faults for tests of engines."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nightherd.params import SamplingParams
from worker.engine.engine import BatchEngine
from worker.engine.interface import Engine, EngineRequest, Output, RequestHandle
from worker.engine.scheduler import Scheduler

VOCAB = 500
"""The tokenizer's size; the model's vocabulary is padded to 512."""
PROMPTS = [
    (17,),
    (5, 9, 33, 71, 20),
    (400, 401, 402, 403, 404, 405, 406, 407, 408),
    (8, 8, 8, 8),
    tuple(range(100, 140)),
]


def ask(prompt: Sequence[int] = PROMPTS[1], **given: Any) -> EngineRequest:
    """A greedy request of 12 tokens; names of EngineRequest's fields go there, others are
    sampling parameters."""
    fields = {"max_new_tokens": 12, "seeds": (1,)}
    sampling: dict[str, Any] = {"temperature": 0}
    for name, value in given.items():
        (fields if name in EngineRequest.__slots__ else sampling)[name] = value
    return EngineRequest(
        prompt_token_ids=tuple(prompt), params=SamplingParams.model_validate(sampling), **fields
    )


def wait(handle: RequestHandle) -> Output:
    (future,) = handle.futures
    return future.result(timeout=20)


def tokens(engine: Engine, *requests: EngineRequest) -> list[tuple[int, ...]]:
    """What one batch of requests of one sample generates; none may fail."""
    outputs = [wait(handle) for handle in [engine.add(request) for request in requests]]
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}, outputs
    return [output.token_ids for output in outputs]


def check(engine: BatchEngine) -> None:
    """Nothing leaked: once idle, every block is free."""
    deadline = threading.Event()
    for _ in range(400):
        if engine.scheduler.idle and not engine._samples:
            break
        deadline.wait(0.01)
    engine.scheduler.check()
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.num_blocks
    assert engine._samples == {}


def admit_freely(scheduler: Scheduler) -> None:
    """From now on it admits any sequence that fits now, without a forecast, so that blocks run out.
    Otherwise they do only where outputs get longer than expected."""
    scheduler._fits_worst_case = lambda sequence, match: True  # type: ignore[method-assign]


class Faulty:
    """Makes the model's forward fail, or wait, when a token of the batch says so."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail: Callable[[torch.Tensor], Exception | None] = lambda ids: None
        self.poison: int | None = None
        self.calls: list[int] = []
        forward = model.forward

        def wrapped(input_ids: torch.Tensor, **given: Any) -> Any:
            self.calls.append(input_ids.shape[0])
            error = self.fail(input_ids)
            if error is not None:
                raise error
            out = forward(input_ids=input_ids, **given)
            if self.poison is not None and input_ids.shape[1] > 1:
                out.logits[(input_ids == self.poison).any(1)] = math.nan
            return out

        # generate asks the signature of forward which arguments it takes.
        monkeypatch.setattr(model, "forward", functools.wraps(forward)(wrapped))


class Gate:
    """Holds the engine in a forward pass until it is opened."""

    def __init__(self, faulty: Faulty, hold_at: int) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        faulty.calls.clear()

        def wait(ids: torch.Tensor) -> None:
            if len(faulty.calls) == hold_at:
                self.reached.set()
                assert self._open.wait(20)

        faulty.fail = wait

    def open(self) -> None:
        self._open.set()
