from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.store.chunks import Held
from nightherd.params import SamplingParams
from tests.fakes import FakeEngine
from tests.worker.harness import make_claim
from worker.chunks.inflight import ChunkRun, InFlight
from worker.engine.interface import EngineRequest, Output

REQUEST = EngineRequest((5,), SamplingParams(), seeds=(1, 2), max_new_tokens=50)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """One whose samples never end by themselves."""
    engine = FakeEngine()
    engine.hang()
    engine.start()
    yield engine
    engine.go_on()
    engine.stop()


def _run(engine: FakeEngine, chunk_id: int = 1, **claim: object) -> ChunkRun:
    return ChunkRun(make_claim(chunk_id=chunk_id, **claim), "me", engine)


def _held(fence: int = 1, state: str = "running") -> Held:
    return Held(fence, "job", state)


def test_every_sample_of_an_aborted_run_is_answered_once(engine: FakeEngine) -> None:
    run = _run(engine)
    answers: list[tuple[int, Output]] = []
    assert run.add(REQUEST, lambda index, output: answers.append((index, output)))
    run.abort()
    run.abort(lost=True)
    engine.go_on()
    assert sorted(index for index, _ in answers) == [0, 1]
    assert {output.finish_reason for _, output in answers} == {"aborted"}
    assert run.lost


def test_an_aborted_run_hands_nothing_more_to_the_engine(engine: FakeEngine) -> None:
    run = _run(engine)
    run.abort()
    assert not run.add(REQUEST, lambda index, output: None)
    assert engine.added == 0
    assert not run.lost


def test_what_is_registered_after_the_drain_began_is_aborted_at_once(engine: FakeEngine) -> None:
    inflight = InFlight()
    early, late = _run(engine, 1), _run(engine, 2)
    inflight.register(early)
    inflight.close()
    inflight.register(late)
    for run in (early, late):
        assert not run.add(REQUEST, lambda index, output: None)


def test_a_run_that_was_replaced_is_not_forgotten_in_its_successors_name(
    engine: FakeEngine,
) -> None:
    inflight = InFlight()
    old, new = _run(engine), _run(engine, fence=2)
    inflight.register(old)
    inflight.register(new)
    inflight.forget(old)
    assert inflight.runs() == [new]


def test_what_the_database_gave_to_others_is_lost(engine: FakeEngine) -> None:
    inflight = InFlight()
    gone, newer, kept = (_run(engine, number) for number in (1, 2, 3))
    anothers = ChunkRun(make_claim(chunk_id=4), "who I was", engine)
    for run in (gone, newer, kept, anothers):
        inflight.register(run)
    unknown = inflight.reconcile("me", {2: _held(fence=2), 3: _held(), 4: _held()})
    assert [run.lost for run in (gone, newer, kept, anothers)] == [True, True, False, True]
    assert unknown == {}


@pytest.mark.parametrize("state", ["paused", "cancelled", "expired", "completed"])
def test_what_nobody_wants_any_more_is_aborted_but_still_saved(
    engine: FakeEngine, state: str
) -> None:
    inflight = InFlight()
    run = _run(engine)
    inflight.register(run)
    inflight.reconcile("me", {1: _held(state=state)})
    assert not run.add(REQUEST, lambda index, output: None)
    assert not run.lost


def test_a_run_that_has_ended_is_left_alone(engine: FakeEngine) -> None:
    inflight = InFlight()
    run = _run(engine)
    inflight.register(run)
    run.ended.set()
    inflight.reconcile("me", {})
    assert not run.lost


def test_chunks_that_nobody_here_knows_are_reported(engine: FakeEngine) -> None:
    inflight = InFlight()
    inflight.register(_run(engine, 1))
    assert list(inflight.reconcile("me", {1: _held(), 9: _held()})) == [9]


def test_whether_an_isolated_chunk_runs_is_known(engine: FakeEngine) -> None:
    inflight = InFlight()
    inflight.register(_run(engine, 1))
    assert not inflight.isolated
    inflight.register(_run(engine, 2, isolated=True))
    assert inflight.isolated
