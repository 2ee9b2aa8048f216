"""From rows to a queued job: all or nothing, whatever happens in between."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError

from models.database import Database
from models.job import Chunk, Job, Request
from models.store import storing as store
from nightherd.errors import DatabaseError, InputError, ParameterError, UsageError
from nightherd.settings import Settings
from producer.inputs.reader import Row, RowProblem
from producer.jobs import create as submit_module
from producer.jobs.create import JobOptions, SubmittedJob, chunk_size, submit
from producer.jobs.status import find_job, job_view, job_views, latest_job
from tests.seeding import KEY, job, job_chunks, make_worker, try_claim

MakeSettings = Callable[..., Settings]


def rows(count: int, **changes: Any) -> list[Row]:
    return [Row(i + 1, {"prompt": f"p{i}"}, changes.get("params"), f"id-{i}") for i in range(count)]


def counts(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            table.__tablename__: connection.execute(
                select(func.count()).select_from(table)
            ).scalar_one()
            for table in (Job, Request, Chunk)
        }


NOTHING = {"jobs": 0, "requests": 0, "chunks": 0}


def visible(database: Database) -> list[str]:
    """What any command, or any worker, could see."""
    with database.read() as connection:
        views = job_views(connection)
        latest = latest_job(connection)
    assert (latest is None) == (not views)
    if not views:
        assert try_claim(database, make_worker(database)) == "nothing"
    return [view.id for view in views]


def test_a_job_and_all_that_belongs_to_it(database: Database, make_settings: MakeSettings) -> None:
    given = [
        Row(1, {"prompt": "a"}, None, "first"),
        Row(2, {"messages": [{"role": "user", "content": "b"}]}, {"n": 3, "top_p": 0.5}, None),
        Row(4, {"prompt": [1, 2, 3], "metadata": {"url": "x"}}, {"seed": 1}, None),
    ]
    options = JobOptions(
        checkpoint_key=KEY,
        params={"max_tokens": 5, "n": 2},
        name="nightly",
        template={"template": "{{ a }}"},
        priority=3,
        metadata={"k": [1, None, "é"]},
        submitted_by="me@here",
    )
    done = submit(database, make_settings(), given, options)
    assert done == SubmittedJob(done.id, done.seed, 3, 7)
    row = job(database, done.id)
    assert (row.state, row.name, row.priority, row.seed) == ("queued", "nightly", 3, done.seed)
    assert (row.params, row.template) == ({"max_tokens": 5, "n": 2}, {"template": "{{ a }}"})
    assert (row.metadata_, row.submitted_by) == ({"k": [1, None, "é"]}, "me@here")
    assert (row.total_requests, row.total_samples) == (3, 7)
    with database.read() as connection:
        stored = connection.execute(select(Request).order_by(Request.position)).all()
    assert [(one.body, one.params, one.custom_id, one.samples) for one in stored] == [
        (given[0].body, None, "first", 2),
        (given[1].body, given[1].params, None, 3),
        (given[2].body, given[2].params, None, 2),
    ]
    assert [one.position for one in stored] == [0, 1, 2]
    assert visible(database) == [done.id]


def test_the_seed_is_given_or_drawn(sqlite_database: Database, make_settings: MakeSettings) -> None:
    def seed(given: int | None) -> int:
        options = JobOptions(checkpoint_key=KEY, seed=given)
        done = submit(sqlite_database, make_settings(), rows(1), options)
        assert job(sqlite_database, done.id).seed == done.seed
        return done.seed

    assert [seed(7), seed(0), seed(-(2**63)), seed(2**63 - 1)] == [7, 0, -(2**63), 2**63 - 1]
    drawn = {seed(None) for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= one < 2**63 for one in drawn)


@pytest.mark.parametrize(
    ("total", "size"),
    [(1, 16), (128, 16), (129, 17), (2048, 256), (10_000_000, 256)],
)
def test_the_size_of_chunks(total: int, size: int) -> None:
    assert chunk_size(total) == size


@pytest.mark.parametrize(("total", "setting"), [(100, None), (10, 3), (9, 3), (5, 100), (1, 1)])
def test_chunks_cover_all_requests_once(
    sqlite_database: Database, make_settings: MakeSettings, total: int, setting: int | None
) -> None:
    settings = make_settings(chunk_size=setting)
    given: list[Row | RowProblem] = [
        Row(i, {"prompt": "p"}, {"n": 1 + i % 3}, None) for i in range(total)
    ]
    done = submit(sqlite_database, settings, given, JobOptions(checkpoint_key=KEY))
    chunks = job_chunks(sqlite_database, done.id)
    size = setting or chunk_size(total)
    assert len(chunks) == math.ceil(total / size)
    positions = [
        p for one in chunks for p in range(one.first_position, one.first_position + one.size)
    ]
    assert positions == list(range(total))
    for one in chunks:
        inside = range(one.first_position, one.first_position + one.size)
        assert one.samples == sum(1 + i % 3 for i in inside)
    assert sum(one.samples for one in chunks) == done.samples


# Bad input: nothing is stored.


def refused(
    database: Database,
    settings: Settings,
    given: Iterable[Row | RowProblem],
    **options: Any,
) -> InputError:
    with pytest.raises(InputError) as refusal:
        submit(
            database, settings, given, JobOptions(checkpoint_key=KEY, **options), source="in.jsonl"
        )
    assert counts(database) == NOTHING
    return refusal.value


def test_no_rows(sqlite_database: Database, make_settings: MakeSettings) -> None:
    error = refused(sqlite_database, make_settings(), [])
    assert str(error) == "in.jsonl is empty: it must hold at least one prompt"


def test_one_bad_row_is_named_in_the_message(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    given = [*rows(3), RowProblem(4, "not JSON"), *rows(2)]
    error = refused(sqlite_database, make_settings(), given)
    assert str(error) == "in.jsonl: 1 row is bad, nothing was stored: line 4: not JSON"
    assert error.problems == ()


def test_each_bad_row_has_its_line(sqlite_database: Database, make_settings: MakeSettings) -> None:
    given: list[Row | RowProblem] = [*rows(2)]
    given += [RowProblem(line, f"bad {line}") for line in range(3, 33)]
    error = refused(sqlite_database, make_settings(), given)
    assert str(error) == "in.jsonl: 30 rows are bad, nothing was stored (and 10 more):"
    assert error.problems == tuple(f"line {line}: bad {line}" for line in range(3, 23))


def test_a_row_that_contradicts_its_job(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """Each layer is sane by itself: min_tokens of the row, max_tokens of the job."""
    given = [*rows(1), Row(2, {"prompt": "p"}, {"min_tokens": 9}, None)]
    error = refused(sqlite_database, make_settings(), given, params={"max_tokens": 5})
    assert "line 2: min_tokens (9) is greater than max_tokens (5)" in str(error)


def test_structures_are_checked_row_by_row_and_stored_as_they_are(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    schema = {"properties": {"z": {"type": "null"}, "a": {"type": "null"}}}
    structure = {"structured_outputs": {"json": schema}}
    bad = {"structured_outputs": {"json": {"type": "objekt"}}}
    given = [*rows(1), Row(2, {"prompt": "p"}, structure, None), Row(3, {"prompt": "p"}, bad, None)]
    error = refused(sqlite_database, make_settings(), given)
    assert "line 3: structured_outputs.json does not compile: Invalid type: objekt" in str(error)
    # One of the job, another of a row: sane by themselves, one too many together.
    error = refused(
        sqlite_database,
        make_settings(),
        given[:2],
        params={"response_format": {"type": "json_object"}},
    )
    assert "line 2: response_format and structured_outputs are both given" in str(error)
    submit(sqlite_database, make_settings(), given[:2], JobOptions(checkpoint_key=KEY))
    with sqlite_database.read() as connection:
        stored = connection.execute(select(Request.params).order_by(Request.index)).scalars().all()
    assert stored == [None, structure]
    # The properties come out in this order.
    assert list(stored[1]["structured_outputs"]["json"]["properties"]) == ["z", "a"]


@pytest.mark.parametrize(
    "params",
    [
        {"structured_outputs": {"regex": "("}},
        {"response_format": {"type": "json_object"}, "stop": ["x"]},
    ],
)
def test_a_bad_structure_of_the_job(
    sqlite_database: Database, make_settings: MakeSettings, params: dict[str, Any]
) -> None:
    options = JobOptions(checkpoint_key=KEY, params=params)
    with pytest.raises(ParameterError, match=r"unclosed group|stop would end"):
        submit(sqlite_database, make_settings(), rows(1), options)
    assert counts(sqlite_database) == NOTHING


def test_a_job_that_contradicts_itself(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    read: list[int] = []

    def never() -> Iterator[Row]:
        read.append(1)
        yield from rows(1)

    options = JobOptions(checkpoint_key=KEY, params={"max_tokens": 5, "min_tokens": 9})
    with pytest.raises(ParameterError, match="min_tokens"):
        submit(sqlite_database, make_settings(), never(), options)
    assert not read
    assert counts(sqlite_database) == NOTHING


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "half \udcff"},
        {"name": "nul \0"},
        {"metadata": {"key \0": 1}},
        {"template": {"columns": [{"a": "\udfff"}]}},
        {"checkpoint_key": "/path/\udce4"},
        {"submitted_by": "\0"},
    ],
)
def test_text_that_no_database_takes(
    sqlite_database: Database, make_settings: MakeSettings, changes: dict[str, Any]
) -> None:
    options = JobOptions(**{"checkpoint_key": KEY, **changes})
    with pytest.raises(
        UsageError,
        match=r"the job's (name|parameters|metadata|template|checkpoint|submitter) holds",
    ):
        submit(sqlite_database, make_settings(), rows(1), options)
    assert counts(sqlite_database) == NOTHING


# Interrupted, cut off, killed.


def test_rows_go_in_batches_and_are_counted(
    database: Database, make_settings: MakeSettings
) -> None:
    told: list[tuple[str, int, int | None]] = []
    seen: list[int] = []

    def progress(phase: str, count: int, total: int | None) -> None:
        told.append((phase, count, total))
        if phase == "storing":
            assert visible(database) == []
            seen.append(counts(database)["requests"])

    settings = make_settings(store_batch=10)
    submit(database, settings, rows(25), JobOptions(checkpoint_key=KEY), progress=progress)
    assert told[:25] == [("checking", i + 1, None) for i in range(25)]
    assert told[25:] == [("storing", 10, 25), ("storing", 20, 25), ("storing", 25, 25)]
    assert seen == [10, 20, 25]


@pytest.mark.parametrize("moment", [10, 20, 25])
def test_ctrl_c_in_the_middle_leaves_nothing(
    database: Database, make_settings: MakeSettings, moment: int
) -> None:
    def progress(phase: str, count: int, total: int | None) -> None:
        if phase == "storing" and count == moment:
            raise KeyboardInterrupt

    settings = make_settings(store_batch=10)
    with pytest.raises(KeyboardInterrupt):
        submit(database, settings, rows(25), JobOptions(checkpoint_key=KEY), progress=progress)
    assert visible(database) == []
    assert counts(database) == NOTHING


def test_ctrl_c_while_rows_are_read_stores_nothing(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    def interrupted() -> Iterator[Row]:
        yield from rows(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(sqlite_database, make_settings(), interrupted(), JobOptions(checkpoint_key=KEY))
    assert counts(sqlite_database) == NOTHING


def test_an_impatient_user_leaves_the_rest_to_housekeeping(
    database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal itself is cut short: the job can never come back, and goes at the next sweep."""
    monkeypatch.setattr(submit_module, "_DISCARD_SECONDS", -1.0)
    real = store.discard_storing
    monkeypatch.setattr(
        store, "discard_storing", lambda c, job_id, limit=7: real(c, job_id, limit=limit)
    )

    def progress(phase: str, count: int, total: int | None) -> None:
        if phase == "storing" and count == 20:
            raise KeyboardInterrupt

    settings = make_settings(store_batch=10)
    with pytest.raises(KeyboardInterrupt):
        submit(database, settings, rows(25), JobOptions(checkpoint_key=KEY), progress=progress)
    assert counts(database)["requests"] == 13
    assert visible(database) == []
    with database.write() as connection:
        assert store.remove_orphans(connection, idle_seconds=600) == 14
    assert counts(database) == NOTHING


class Unlucky(Database):
    """Loses the answer to every commit once: each transaction is done, and then done again."""

    lucky = True

    @contextmanager
    def _begin(self, *, reading: bool) -> Iterator[Any]:
        with super()._begin(reading=reading) as connection:
            yield connection
        self.lucky = reading or not self.lucky
        if not self.lucky:
            raise OperationalError(None, None, sqlite3.OperationalError("database is locked"))


def test_every_answer_is_lost_once(database: Database, make_settings: MakeSettings) -> None:
    unlucky = Unlucky(database.url.render_as_string(hide_password=False))
    settings = make_settings(store_batch=10, chunk_size=4)
    done = submit(unlucky, settings, rows(25), JobOptions(checkpoint_key=KEY))
    unlucky.close()
    assert visible(database) == [done.id]
    with database.read() as connection:
        view = job_view(connection, done.id)
        stored = connection.execute(
            select(Request.index).where(Request.job_id == done.id).order_by(Request.index)
        )
        assert stored.scalars().all() == list(range(25))
        # Of the job whose beginning was not answered an empty shell is left, seen by nobody.
        states = connection.execute(select(Job.state)).scalars().all()
    assert sorted(states) == ["queued", "storing"]
    assert (view.samples, view.chunks_queued) == (25, 7)


def test_every_answer_of_a_small_job_is_lost_once(
    database: Database, make_settings: MakeSettings
) -> None:
    unlucky = Unlucky(database.url.render_as_string(hide_password=False))
    done = submit(unlucky, make_settings(), rows(5), JobOptions(checkpoint_key=KEY))
    unlucky.close()
    assert counts(database) == {"jobs": 1, "requests": 5, "chunks": 1}
    assert visible(database) == [done.id]


@pytest.mark.parametrize(("last", "batch"), [("finish_storing", 2), ("insert_live_job_rows", 100)])
def test_a_database_that_goes_away_for_good(
    database: Database,
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    last: str,
    batch: int,
) -> None:
    """One line, and nothing visible; what was stored goes when the database is back."""

    def gone(*_: Any) -> None:
        raise OperationalError(None, None, sqlite3.OperationalError("database is locked"))

    real = Database.retrying

    def impatient(self: Database, work: Any, **options: Any) -> Any:
        return real(self, work, **{**options, "patience": 0.1})

    monkeypatch.setattr(Database, "retrying", impatient)
    monkeypatch.setattr(store, last, gone)
    with pytest.raises(DatabaseError, match="locked"):
        submit(database, make_settings(store_batch=batch), rows(3), JobOptions(checkpoint_key=KEY))
    assert counts(database) == NOTHING


def test_ids_that_collide_are_drawn_again(
    database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(["same", "same", "other"])
    monkeypatch.setattr(submit_module, "new_id", lambda: next(ids))
    done = [
        submit(database, make_settings(), rows(1), JobOptions(checkpoint_key=KEY)).id
        for _ in range(2)
    ]
    assert done == ["same", "other"]


def test_a_reference_that_does_not_exist_is_not_tried_for_ever(
    database: Database, make_settings: MakeSettings
) -> None:
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        submit(database, make_settings(), rows(1), JobOptions(checkpoint_key=KEY, firing_id=99))
    assert counts(database) == NOTHING


def test_a_worker_can_write_while_a_large_job_is_stored(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """One transaction of 20,000 rows holds SQLite's lock for a fraction of a second."""
    longest = 0.0
    between = time.monotonic()

    def progress(phase: str, count: int, total: int | None) -> None:
        nonlocal longest, between
        if phase != "storing":
            between = time.monotonic()
            return
        longest = max(longest, time.monotonic() - between)
        with sqlite_database.write() as connection:
            connection.execute(text("UPDATE sweeps SET last_at = last_at"))
        between = time.monotonic()

    submit(
        sqlite_database,
        make_settings(),
        (Row(i, {"prompt": f"prompt {i}"}, None, None) for i in range(40_000)),
        JobOptions(checkpoint_key=KEY),
        progress=progress,
    )
    assert longest < 5  # 0.2 s on an idle machine


# Finding a job again.


def test_any_unique_beginning_of_an_id_will_do(
    database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(["1abc", "1abd", "1ab", "2xyz", "9_%"])
    monkeypatch.setattr(submit_module, "new_id", lambda: next(ids))
    for _ in range(5):
        submit(database, make_settings(), rows(1), JobOptions(checkpoint_key=KEY))
    with database.read() as connection:
        assert find_job(connection, "2") == "2xyz"
        assert find_job(connection, " 1ABC ") == "1abc"
        assert find_job(connection, "1ab") == "1ab"  # whole, though others begin with it
        with pytest.raises(UsageError, match="several jobs"):
            find_job(connection, "1")
        for unknown in ("3", "", "%", "_", "2xyz2", "\udcff", "ä", "'; --"):
            with pytest.raises(Exception, match="no job"):
                find_job(connection, unknown)
