"""The oracle: what became of every sample that was asked for.

It knows what was submitted and what every text must be, and looks at what is stored: a sample is
ok, lost, duplicated or unexpected. From the workers' ledger it counts what was computed again, and
how long it took after a fault until the work that it interrupted went on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import func, select

from models.database import Database
from models.job import ENDED_JOB_STATES, Chunk, Job
from nightherd.params import sample_seed
from producer.results.export import iterate_results
from tests.faults.serve import text_of

SampleKey = tuple[str, int, int]
"""Job, index, sample."""

_SHOWN = 5


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted, and what must become of it."""

    job_id: str
    seed: int
    """Another for each job, so that a sample's seed says whose it is."""
    prompts: tuple[str, ...]
    samples: int = 1
    max_tokens: int | Sequence[int] = 8
    """Of all requests, or of each."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Indices that must fail, with their code."""
    states: tuple[str, ...] = ("completed",)
    """In which it may be at the end; one that was cancelled may lack results."""

    @property
    def sample_keys(self) -> Iterable[SampleKey]:
        return (
            (self.job_id, index, sample)
            for index in range(len(self.prompts))
            for sample in range(self.samples)
        )

    @cached_property
    def seeds(self) -> dict[int, SampleKey]:
        """The sample of each seed."""
        return {sample_seed(self.seed, None, index, sample): (job, index, sample)
                for job, index, sample in self.sample_keys}  # fmt: skip

    def expected(self, index: int, sample: int) -> str:
        seed = sample_seed(self.seed, None, index, sample)
        return text_of(self.prompts[index], seed=seed, max_tokens=self.tokens_of(index))

    def tokens_of(self, index: int) -> int:
        return self.max_tokens if isinstance(self.max_tokens, int) else self.max_tokens[index]


class Line(NamedTuple):
    """A line of the ledger; see `tests.faults.serve.Ledger`."""

    kind: str
    value: str
    pid: int
    at: float


def read_ledger(path: Path) -> list[Line]:
    if not path.exists():
        return []
    lines = (line.split() for line in path.read_text().splitlines())
    return [Line(kind, value, int(pid), float(at)) for kind, value, pid, at in lines]


@dataclass(frozen=True)
class Fault:
    """When something was done to a worker, and the seeds of the samples that it concerned."""

    at: float
    hit: Collection[int]
    """Those that the worker held and had not saved."""
    saved: Collection[int] = ()
    """Those that were stored by then, by whatever worker: they must not be computed again."""


@dataclass
class Verdict:
    """What became of all samples."""

    ok: int = 0
    lost: list[SampleKey] = field(default_factory=list)
    duplicated: list[SampleKey] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """What nobody asked for, a wrong text, a wrong error, counters that do not add up."""
    recomputed: int = 0
    """How often a sample was computed that had been before."""
    recovery: float | None = None
    """The longest time in seconds from a fault until the first sample that it hit was computed."""

    def assert_clean(self) -> None:
        bad = [*self.lost, *self.duplicated, *self.unexpected]
        assert not bad, self

    def __str__(self) -> str:
        parts = [f"{self.ok} ok"]
        for name in ("lost", "duplicated", "unexpected"):
            found: list[Any] = getattr(self, name)
            more = ", …" if len(found) > _SHOWN else ""
            shown = f": {', '.join(map(str, found[:_SHOWN]))}{more}" if found else ""
            parts.append(f"{len(found)} {name}{shown}")
        return "; ".join([*parts, f"{self.recomputed} computed again"])


def judge(
    database: Database,
    submitted: Sequence[Submitted],
    *,
    ledger: Path | None = None,
    faults: Sequence[Fault] = (),
) -> Verdict:
    """Looks at everything that is stored, once the jobs have ended."""
    verdict = Verdict()
    for job in submitted:
        rows = list(iterate_results(database, job.job_id))
        classify(verdict, job, rows)
        verdict.unexpected += _wrong_counts(database, job, rows)
    with database.read() as connection:
        stored = set(connection.execute(select(Job.id)).scalars())
    for job_id in stored - {job.job_id for job in submitted}:
        verdict.unexpected.append(f"job {job_id} was not asked for")
    if ledger is not None:
        check_ledger(verdict, submitted, read_ledger(ledger), faults)
    return verdict


def classify(verdict: Verdict, job: Submitted, rows: Iterable[Mapping[str, Any]]) -> None:
    """Sorts the samples of a job into the verdict, by its rows as exported."""
    wanted = set(job.sample_keys)
    seen: set[SampleKey] = set()
    for row in rows:
        key = (job.job_id, row["index"], row["sample"])
        if key not in wanted:
            verdict.unexpected.append(f"{key} was not asked for")
        elif key in seen:
            verdict.duplicated.append(key)
        else:
            seen.add(key)
            wrong = _wrong(job, row)
            if wrong is None:
                verdict.ok += 1
            else:
                verdict.unexpected.append(f"{key} {wrong}")
    if job.states == ("completed",):
        verdict.lost += sorted(wanted - seen)


def _wrong(job: Submitted, row: Mapping[str, Any]) -> str | None:
    """What is wrong with a sample's row."""
    code = None if row["error"] is None else row["error"]["code"]
    must_fail = job.errors.get(row["index"])
    if code != must_fail:
        return f"has the error {code}, not {must_fail}: {row['error']}"
    if code is not None:
        return None
    expected = job.expected(row["index"], row["sample"])
    if row["text"] != expected:
        return f"has the text {row['text']!r}, not {expected!r}"
    if row["completion_tokens"] != job.tokens_of(row["index"]) or row["finish_reason"] != "length":
        return f"has {row['completion_tokens']} tokens and the end {row['finish_reason']}"
    return None


def _wrong_counts(
    database: Database, job: Submitted, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What does not add up between a job's state, its chunks' counters and its results."""
    counters = ("samples", "done", "failed", "prompt_tokens", "completion_tokens")
    with database.read() as connection:
        state = connection.execute(
            select(Job.state).where(Job.id == job.job_id)
        ).scalar_one_or_none()
        of_job = Chunk.job_id == job.job_id
        chunks = Counter(connection.execute(select(Chunk.state).where(of_job)).scalars())
        sums = connection.execute(
            select(*(func.sum(getattr(Chunk, name)) for name in counters)).where(of_job)
        ).one()
    counted = dict(zip(counters, (int(value or 0) for value in sums), strict=True))
    good = [row for row in rows if row["error"] is None]
    # What a cancelled retry did not get to counts as failed, and so do the results of its past.
    real = {
        "samples": len(job.prompts) * job.samples,
        "done": len(good),
        "failed": len(rows) - len(good),
        "prompt_tokens": sum(row["prompt_tokens"] for row in good if row["sample"] == 0),
        "completion_tokens": sum(row["completion_tokens"] for row in good),
    }
    wrong = [
        f"job {job.job_id} counts {counted[name]} {name}, and has {real[name]}"
        for name in counters
        if counted[name] != real[name]
    ]
    if state not in job.states:
        wrong.append(f"job {job.job_id} is {state}, not {' or '.join(job.states)}")
    ends = {"done"} if state == "completed" else {"done", "cancelled"}
    if state in ENDED_JOB_STATES and not set(chunks) <= ends:
        wrong.append(f"job {job.job_id} is {state} and has chunks {dict(chunks)}")
    return wrong


def check_ledger(
    verdict: Verdict, submitted: Sequence[Submitted], lines: Sequence[Line], faults: Sequence[Fault]
) -> None:
    """From the ledger: what was computed again, and how long work that a fault hit had to wait."""
    owners: dict[int, SampleKey] = {}
    for job in submitted:
        owners |= job.seeds
    computed = [(int(line.value), line.at) for line in lines if line.kind == "sample"]
    times = Counter(seed for seed, _ in computed)
    verdict.unexpected += [
        f"a sample with the seed {seed} was computed, and was not asked for"
        for seed in times
        if seed not in owners
    ]
    verdict.recomputed = times.total() - len(times)
    again = {
        owners[seed]
        for fault in faults
        for seed, at in computed
        if at > fault.at and seed in fault.saved and seed in owners
    }
    verdict.unexpected += [f"{key} was saved, and computed again" for key in sorted(again)]
    waits = [
        min(at for seed, at in computed if at > fault.at and seed in fault.hit) - fault.at
        for fault in faults
        if any(at > fault.at and seed in fault.hit for seed, at in computed)
    ]
    verdict.recovery = max(waits, default=None)
