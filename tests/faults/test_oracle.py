"""The oracle itself: one that cannot find a loss, a duplicate or a wrong text is worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, update

from models.base import new_id
from models.database import Database
from models.job import Chunk, Job, Result
from models.store import storing
from nightherd.params import sample_seed
from tests.fakes import CHECKPOINT
from tests.faults import oracle
from tests.faults.oracle import Fault, Line, Submitted, Verdict, check_ledger, classify, judge
from tests.faults.serve import Ledger

PROMPTS = ("a", "be", "see", "dead")


def _row(job: Submitted, index: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "sample": sample,
        "text": job.expected(index, sample) if 0 <= index < len(job.prompts) else "",
        "finish_reason": "length",
        "prompt_tokens": index + 1,
        "completion_tokens": 8,
        "error": None,
        **changes,
    }


def _failure(job: Submitted, index: int, code: str) -> dict[str, Any]:
    return _row(job, index, text=None, error={"code": code, "message": ""})


JOB = Submitted("job", 7, PROMPTS, samples=2)
ROWS = [_row(JOB, index, sample) for index in range(4) for sample in range(2)]


def _classified(rows: list[dict[str, Any]], job: Submitted = JOB) -> Verdict:
    verdict = Verdict()
    classify(verdict, job, rows)
    return verdict


def test_what_is_as_it_must_be_is_ok() -> None:
    verdict = _classified(ROWS)
    assert verdict == Verdict(ok=8)
    verdict.assert_clean()


def test_texts_differ_by_prompt_and_sample() -> None:
    assert len({row["text"] for row in ROWS}) == 8


def test_a_sample_without_a_row_is_lost() -> None:
    verdict = _classified([row for row in ROWS if (row["index"], row["sample"]) != (2, 1)])
    assert verdict == Verdict(ok=7, lost=[("job", 2, 1)])
    with pytest.raises(AssertionError, match="1 lost"):
        verdict.assert_clean()


def test_a_second_row_of_a_sample_is_a_duplicate() -> None:
    verdict = _classified([*ROWS, ROWS[3]])
    assert verdict == Verdict(ok=8, duplicated=[("job", 1, 1)])
    with pytest.raises(AssertionError, match="1 duplicated"):
        verdict.assert_clean()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"text": "something else"}, "text"),
        ({"text": JOB.expected(1, 1)}, "text"),
        ({"text": JOB.expected(1, 0)[:-1]}, "text"),
        ({"completion_tokens": 7}, "7 tokens"),
        ({"finish_reason": "stop"}, "the end stop"),
        ({"text": None, "error": {"code": "poison", "message": ""}}, "the error poison"),
    ],
)
def test_a_wrong_result_is_unexpected(changes: dict[str, Any], word: str) -> None:
    verdict = _classified([{**row, **changes} if row is ROWS[2] else row for row in ROWS])
    assert (verdict.ok, verdict.lost, verdict.duplicated) == (7, [], [])
    (found,) = verdict.unexpected
    assert word in found
    with pytest.raises(AssertionError, match="1 unexpected"):
        verdict.assert_clean()


@pytest.mark.parametrize("key", [(4, 0), (-1, 0), (0, 2)])
def test_what_nobody_asked_for_is_unexpected(key: tuple[int, int]) -> None:
    verdict = _classified([*ROWS, _row(JOB, *key)])
    assert verdict.unexpected == [f"{('job', *key)} was not asked for"]


def test_a_request_that_must_fail_must_fail_with_its_code() -> None:
    job = Submitted("job", 7, PROMPTS, errors={3: "poison"})
    rows = [_row(job, index) for index in range(3)]
    assert _classified([*rows, _failure(job, 3, "poison")], job) == Verdict(ok=4)
    for wrong in (_row(job, 3), _failure(job, 3, "engine_error")):
        verdict = _classified([*rows, wrong], job)
        assert (verdict.ok, len(verdict.unexpected)) == (3, 1)


def test_each_request_may_have_a_length_of_its_own() -> None:
    job = Submitted("job", 7, PROMPTS, max_tokens=(1, 2, 3, 4))
    rows = [_row(job, index, completion_tokens=index + 1) for index in range(4)]
    assert [len(row["text"]) for row in rows] == [1, 2, 3, 4]
    assert _classified(rows, job) == Verdict(ok=4)
    assert _classified([_row(job, 0)], job).unexpected


def test_a_cancelled_job_may_lack_results_but_have_no_wrong_ones() -> None:
    job = Submitted("job", 7, PROMPTS, states=("cancelled",))
    assert _classified([_row(job, 1)], job) == Verdict(ok=1)
    assert _classified([_row(job, 1, text="x")], job).unexpected


def _line(job: Submitted, index: int, at: float) -> Line:
    return Line("sample", str(sample_seed(job.seed, None, index, 0)), 1, at)


def test_what_was_computed_again_is_counted() -> None:
    other = Submitted("other", 8, PROMPTS)
    lines = [_line(JOB, 0, 1), _line(JOB, 1, 2), _line(JOB, 0, 3), _line(JOB, 0, 4)]
    verdict = Verdict()
    check_ledger(
        verdict, [JOB, other], [*lines, _line(other, 0, 5), Line("wake", "done", 1, 6)], []
    )
    assert verdict == Verdict(recomputed=2)
    check_ledger(verdict, [JOB], [_line(other, 0, 5)], [])
    assert len(verdict.unexpected) == 1, "no sample of a job has this seed"


def test_computing_again_what_was_saved_is_unexpected() -> None:
    saved = [sample_seed(JOB.seed, None, 1, 0)]
    lines = [_line(JOB, 1, 9), _line(JOB, 0, 9), _line(JOB, 0, 11)]
    verdict = Verdict()
    check_ledger(verdict, [JOB], lines, [Fault(10, (), saved)])
    assert verdict == Verdict(recomputed=1)
    check_ledger(verdict, [JOB], [*lines, _line(JOB, 1, 11)], [Fault(10, (), saved)])
    assert verdict.unexpected == [f"{('job', 1, 0)} was saved, and computed again"]


def test_recovery_is_the_longest_wait_for_work_that_was_hit() -> None:
    hit = [sample_seed(JOB.seed, None, index, 0) for index in (1, 2)]
    lines = [_line(JOB, 1, 9), _line(JOB, 0, 11), _line(JOB, 2, 12.5), _line(JOB, 1, 13)]
    verdict = Verdict()
    check_ledger(verdict, [JOB], lines, [Fault(10, hit), Fault(12, hit), Fault(99, hit)])
    assert verdict.recovery == 2.5


def test_every_line_of_the_ledger_comes_back(tmp_path: Path) -> None:
    assert oracle.read_ledger(tmp_path / "none") == []
    path = tmp_path / "ledger"
    for _ in range(2):
        Ledger(str(path)).add("sample", 12)
    first, second = oracle.read_ledger(path)
    assert (first.kind, first.value, second.value) == ("sample", "12", "12")
    assert first.at <= second.at
    Ledger(None).add("sample", 12)


Change = Callable[[str], Any]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda job: update(Chunk).where(Chunk.job_id == job).values(done=3), "counts 3 done"),
        (
            lambda job: update(Chunk).where(Chunk.job_id == job).values(completion_tokens=31),
            "counts 31 completion_tokens",
        ),
        (lambda job: update(Chunk).where(Chunk.job_id == job).values(state="queued"), "chunks"),
        (lambda job: update(Job).where(Job.id == job).values(state="running"), "is running"),
        (lambda job: delete(Result).where(Result.job_id == job, Result.index == 2), "2, 0"),
        (lambda job: update(Result).where(Result.index == 2).values(text="x"), "the text 'x'"),
    ],
)
def test_it_finds_what_is_wrong_in_a_database(
    sqlite_database: Database, change: Change, word: str
) -> None:
    job = Submitted(new_id(), 7, PROMPTS)
    with sqlite_database.write() as connection:
        storing.begin_storing(connection, storing.NewJob(job.job_id, CHECKPOINT, 7, {}))
        requests = [
            storing.NewRequest(index, {"prompt": prompt}, None, None, 1)
            for index, prompt in enumerate(PROMPTS)
        ]
        storing.store_requests(connection, job.job_id, requests)
        storing.finish_storing(connection, job.job_id, [storing.ChunkRange(0, 4, 4)])
        connection.execute(
            update(Chunk).values(state="done", done=4, prompt_tokens=10, completion_tokens=32)
        )
        connection.execute(update(Job).values(state="completed"))
        for index in range(4):
            row = {name: value for name, value in _row(job, index).items() if name != "error"}
            connection.execute(insert(Result).values(job_id=job.job_id, pass_=1, **row))
    judge(sqlite_database, [job]).assert_clean()
    (found,) = judge(sqlite_database, []).unexpected
    assert "not asked for" in found
    with sqlite_database.write() as connection:
        connection.execute(change(job.job_id))
    with pytest.raises(AssertionError, match=word):
        judge(sqlite_database, [job]).assert_clean()
