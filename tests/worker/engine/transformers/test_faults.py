"""Requests that cannot run, things that break, aborting, order and stopping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nightherd.params import SamplingParams
from tests.engines import PROMPTS, VOCAB, Faulty, Gate, ask, tokens, wait
from worker.engine.interface import EngineRequest, RequestHandle
from worker.engine.transformers.transformers_engine import TransformersEngine


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (ask(()), "invalid_request", "the prompt is empty"),
        (ask((3, VOCAB)), "invalid_request", "prompt has the token id 500, which is not in the"),
        (ask((3, -1)), "invalid_request", "prompt has the token id -1"),
        (ask(max_new_tokens=0), "invalid_request", "at least 1"),
        (ask((3,) * 250, max_new_tokens=7), "context_length_exceeded", "250 prompt tokens and 7"),
        (ask(logit_bias={600: 1}), "invalid_request", "logit_bias has the token id 600"),
        (ask(allowed_token_ids=[600]), "invalid_request", "allowed_token_ids has"),
        (ask(bad_words=((3, 600),)), "invalid_request", "bad_words has"),
        (ask(bad_words=((),)), "invalid_request", "a bad word has no tokens"),
        (ask(stop_token_ids=frozenset([600])), "invalid_request", "stop_token_ids has"),
        (ask(structured_outputs={"json": {}}), "unsupported_parameter", "structured_outputs"),
        (ask(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
        (
            ask(allowed_token_ids=[9], eos_token_ids=frozenset([9]), min_tokens=1, temperature=1),
            "invalid_request",
            "leave no token to choose",
        ),
        (ask(allowed_token_ids=[9], bad_words=((9,),)), "invalid_request", "leave no token"),
    ],
)
def test_a_request_that_cannot_run_fails_alone(
    engine: TransformersEngine, request_: EngineRequest, code: str, message: str
) -> None:
    (wanted,) = tokens(engine, ask(max_new_tokens=5))
    before, bad, after = (engine.add(each) for each in (ask(max_new_tokens=5), request_, ask()))
    output = wait(bad)
    assert (output.finish_reason, output.error_code, output.token_ids) == ("error", code, ())
    assert message in (output.error_message or "")
    assert wait(before).token_ids == wanted
    assert wait(after).token_ids[:5] == wanted


def test_the_whole_context_can_be_used_in_a_batch_wider_than_it(
    engine: TransformersEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    full, short = ask((3,) * 250, max_new_tokens=6), ask((3, 4), max_new_tokens=60)
    together = tokens(engine, full, short)
    assert [len(row) for row in together] == [6, 60]
    assert together == [tokens(engine, full)[0], tokens(engine, short)[0]]
    assert capfd.readouterr().err == ""


def test_a_plain_text_format_asks_for_nothing(engine: TransformersEngine) -> None:
    assert engine.unsupported(SamplingParams(response_format={"type": "text"})) is None
    assert engine.unsupported(SamplingParams()) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a kernel\nbroke"), "engine_error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
    ],
)
def test_one_poisonous_request_fails_alone(
    engines: Callable[..., TransformersEngine], faulty: Faulty, error: Exception, code: str
) -> None:
    requests = [ask((3, 10 + index), temperature=1.0) for index in range(8)]
    wanted = tokens(engines(), *requests)
    faulty.fail = lambda ids: error if bool((ids == 499).any()) else None
    faulty.calls.clear()
    engine = engines(start=False)
    bad = engine.add(ask((499, 3)))
    good = [engine.add(request) for request in requests]
    engine.start()
    output = wait(bad)
    assert (output.finish_reason, output.error_code) == ("error", code)
    assert "\n" not in (output.error_message or "")
    assert [wait(handle).token_ids for handle in good] == wanted
    # All nine, then halves of five and four, then the five alone.
    assert list(dict.fromkeys(faulty.calls)) == [9, 5, 1, 4]
    assert engine.stats().running == 0
    # And the thread goes on.
    assert tokens(engine, requests[0]) == wanted[:1]


def test_a_failure_of_memory_alone_is_healed_by_a_smaller_batch(
    engine: TransformersEngine, faulty: Faulty
) -> None:
    requests = [ask((3, 10 + index)) for index in range(8)]
    wanted = tokens(engine, *requests)
    faulty.fail = lambda ids: torch.OutOfMemoryError("x") if ids.shape[0] > 4 else None
    assert tokens(engine, *requests) == wanted


def test_what_had_ended_before_a_failure_is_kept(
    engines: Callable[..., TransformersEngine], faulty: Faulty
) -> None:
    short, long = ask((3,), max_new_tokens=2), ask((4,), max_new_tokens=9)
    wanted = tokens(engines(), short, long)
    engine = engines(start=False)
    faulty.calls.clear()
    faulty.fail = lambda ids: ValueError("late") if len(faulty.calls) == 5 else None
    handles = [engine.add(short), engine.add(long)]
    engine.start()
    outputs = [wait(handle) for handle in handles]
    assert [output.token_ids for output in outputs] == wanted
    assert faulty.calls[:5] == [2] * 5
    assert set(faulty.calls[5:]) == {1}


def test_logits_that_are_not_finite_fail_their_row_alone(
    engine: TransformersEngine, faulty: Faulty
) -> None:
    good = ask((3, 4), temperature=0.8, top_p=0.9)
    wanted = tokens(engine, good)
    faulty.poison = 77
    bad, fine = engine.add(ask((77, 4), temperature=0.8, top_p=0.9)), engine.add(good)
    assert "not finite" in (wait(bad).error_message or "")
    assert [wait(fine).token_ids] == wanted


def test_a_stop_check_that_raises_fails_its_row_alone(engine: TransformersEngine) -> None:
    def bad_factory() -> Any:
        raise RuntimeError("no check")

    def bad_check(token: int) -> bool:
        raise RuntimeError("no answer")

    (wanted,) = tokens(engine, ask())
    first = engine.add(ask(make_stop_check=bad_factory))
    second = engine.add(ask(make_stop_check=lambda: bad_check))
    third = engine.add(ask())
    assert wait(first).error_message == "RuntimeError: no check"
    assert wait(second).error_message == "RuntimeError: no answer"
    assert wait(third).token_ids == wanted


def test_a_lost_device_aborts_and_says_so(
    engine: TransformersEngine, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.fail = lambda ids: RuntimeError("CUDA error: an illegal memory access")
    monkeypatch.setattr(engine, "_device_lost", lambda: True)
    handles = [engine.add(ask()) for _ in range(5)]
    assert {wait(handle).finish_reason for handle in handles} == {"aborted"}
    assert engine.broken is not None
    assert wait(engine.add(ask())).finish_reason == "aborted"


def test_abort_in_the_middle_answers_at_once_and_harms_no_neighbour(
    engines: Callable[..., TransformersEngine], faulty: Faulty
) -> None:
    requests = [ask((3, index), temperature=1.0) for index in (10, 11, 12)]
    wanted = tokens(engines(), *requests)
    gate = Gate(faulty, hold_at=6)
    engine = engines(start=False)
    handles = [engine.add(request) for request in requests]
    engine.start()
    assert gate.reached.wait(20)
    waiting = engine.add(ask())
    assert engine.stats().running == 3
    assert engine.stats().waiting == 1

    engine.abort([handles[1], waiting])
    for aborted in (handles[1], waiting):
        assert aborted.aborted
        assert aborted.futures[0].done()
        assert aborted.futures[0].result().finish_reason == "aborted"
    assert not handles[0].futures[0].done()
    assert engine.stats().running == 2
    assert engine.stats().waiting == 0

    gate.open()
    assert [wait(handles[index]).token_ids for index in (0, 2)] == [wanted[0], wanted[2]]
    engine.abort(handles)
    assert wait(handles[1]).finish_reason == "aborted"
    assert wait(handles[0]).finish_reason == "length"


def test_a_batch_ends_when_all_of_it_is_aborted(engine: TransformersEngine, faulty: Faulty) -> None:
    gate = Gate(faulty, hold_at=3)
    handle = engine.add(ask(max_new_tokens=200))
    assert gate.reached.wait(20)
    engine.abort([handle])
    gate.open()
    assert len(tokens(engine, ask())) == 1
    assert len(faulty.calls) < 3 + 1 + 12 + 2


def test_an_answer_cannot_be_cancelled(engine: TransformersEngine) -> None:
    handle = engine.add(ask())
    assert not handle.futures[0].cancel()
    assert wait(handle).finish_reason == "length"


def test_higher_priority_first_then_arrival(
    engines: Callable[..., TransformersEngine], faulty: Faulty
) -> None:
    engine = engines(start=False, max_batch=2)
    order: list[str] = []
    handles = []
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 0), ("e", 5), ("f", 9)):
        handle = engine.add(ask(max_new_tokens=2, priority=priority))
        handle.futures[0].add_done_callback(lambda _, name=name: order.append(name))
        handles.append(handle)
    engine.start()
    for handle in handles:
        wait(handle)
    assert order == ["f", "c", "e", "a", "b", "d"]
    assert set(faulty.calls) == {2}


def test_samples_beyond_a_batch_wait_for_the_next(
    engines: Callable[..., TransformersEngine], faulty: Faulty
) -> None:
    engine = engines(max_batch=3)
    handle = engine.add(ask(max_new_tokens=1, seeds=tuple(range(8))))
    for future in handle.futures:
        assert future.result(20).finish_reason == "length"
    assert faulty.calls == [3, 3, 2]


def test_stop_aborts_everything(engines: Callable[..., TransformersEngine], faulty: Faulty) -> None:
    engine = engines(max_batch=2)
    gate = Gate(faulty, hold_at=2)
    handles = [engine.add(ask(max_new_tokens=100)) for _ in range(5)]
    assert gate.reached.wait(20)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    for handle in handles:
        assert wait(handle).finish_reason == "aborted"
    gate.open()
    stopper.join(20)
    assert not stopper.is_alive()
    assert len(faulty.calls) <= 3
    assert wait(engine.add(ask())).finish_reason == "aborted"
    engine.stop()


def test_stop_before_start_aborts_too(engines: Callable[..., TransformersEngine]) -> None:
    engine = engines(start=False)
    handle = engine.add(ask())
    engine.stop()
    assert wait(handle).finish_reason == "aborted"


def test_counters(engines: Callable[..., TransformersEngine], faulty: Faulty) -> None:
    engine = engines()
    idle = engine.stats()
    assert (idle.steps, idle.step_started, idle.longest_recent_step) == (0, None, 0)
    gate = Gate(faulty, hold_at=4)
    before = time.monotonic()
    handle = engine.add(ask(seeds=(1, 2)))
    assert gate.reached.wait(20)
    busy = engine.stats()
    assert busy.step_started is not None
    assert before < busy.step_started < time.monotonic()
    assert (busy.steps, busy.running, busy.waiting) == (3, 2, 0)
    time.sleep(0.05)
    gate.open()
    for future in handle.futures:
        future.result(20)
    while engine.stats().step_started is not None:
        time.sleep(0.005)
    done = engine.stats()
    assert (done.steps, done.running) == (12, 0)
    assert (done.prompt_tokens, done.completion_tokens) == (2 * len(PROMPTS[1]), 24)
    assert done.longest_recent_step >= 0.05


def test_many_threads_add_and_abort(engine: TransformersEngine) -> None:
    """Every sample gets exactly one answer, whatever the order."""
    handles: list[RequestHandle] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        for index in range(12):
            handle = engine.add(
                ask((3, number, index), temperature=1.0, max_new_tokens=1 + index % 5)
            )
            with lock:
                handles.append(handle)
            if index % 3 == 0:
                engine.abort([handle])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [wait(handle).finish_reason for handle in handles]
    assert len(reasons) == 48
    assert set(reasons) <= {"length", "aborted"}
    assert reasons.count("length") >= 32
