"""Fault 17: kill -9 around the publishing of wake-ups; many who do the same thing at once."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import func, select, update

from models.base import db_now
from models.database import Database
from models.job import OPEN_JOB_STATES, Chunk, Job
from models.store import chunks, jobs, results
from models.worker import Worker
from nightherd.queue import KEY_PREFIX, queue_name
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from producer.fleet.housekeeping import Housekeeper
from tests.conftest import start_redis, wait_until
from tests.faults.killing import (
    at_once,
    kills,
    pause,
    postgresql_copy,
    url_of,
    wait_for_rollback,
    without_kills,
)
from tests.seeding import (
    KEY,
    as_save,
    check_sums,
    claim,
    die,
    job,
    job_chunks,
    lapse,
    make_job,
    make_worker,
    pending_samples,
    result_row,
    save,
    work_off,
)
from tests.worker.harness import store_job
from tests.worker.process.test_app import WorkerCluster

MakeSettings = Callable[..., Settings]


@pytest.fixture
def server(redis_socket: Path) -> Iterator[redis.Redis]:
    client = redis.Redis(unix_socket_path=str(redis_socket))
    yield client
    client.close()


def _waiting(server: redis.Redis) -> int:
    return int(server.llen(KEY_PREFIX + queue_name(KEY)))  # type: ignore[arg-type]


def _settings(home: str) -> Settings:
    return Settings.model_validate({"home": home})


# Around top_up.


def top_up_in_child(url: str, broker_url: str, home: str) -> None:
    Dispatcher(Database(url), _settings(home), broker_url).top_up(KEY)


def end_and_top_up_in_child(url: str, broker_url: str, home: str) -> None:
    """A worker ends its chunk and publishes wake-ups for the next ones."""
    database = Database(url)
    with without_kills():
        worker = make_worker(database, slots=1)
        held = claim(database, worker)
    save(database, worker, held)
    Dispatcher(database, _settings(home), broker_url).top_up(KEY)


@pytest.mark.parametrize("piece", [top_up_in_child, end_and_top_up_in_child])
def test_kill9_around_top_up(
    database: Database,
    server: redis.Redis,
    broker_url: str,
    tmp_path: Path,
    make_settings: MakeSettings,
    piece: Callable[..., None],
) -> None:
    """Whatever was published, the next tick makes it as many as there should be, and no more."""
    live = make_worker(database, slots=2)
    settings = make_settings()
    job_id = make_job(database, 400)
    seen = set()
    given = (url_of(database), broker_url, str(tmp_path / "home"))
    for point in kills(piece, *given, also=["celery:Celery.send_task"]):
        wait_for_rollback(database)
        published, wanted = _waiting(server), 2 * _live_slots(database)
        seen.add(published)
        tick = Housekeeper(database, Dispatcher(database, settings, broker_url), settings).tick()
        assert published + tick.wake_ups == _waiting(server) == wanted, point
        server.flushall()
        _mark_dead_all_but(database, live)
    wanted = 2 * _live_slots(database)
    assert _waiting(server) == wanted
    assert set(range(wanted + 1)) == seen
    work_off(database, live)
    _mark_dead_all_but(database, live)
    work_off(database, live)
    assert job(database, job_id).state == "completed"
    check_sums(database, job_id)


def _live_slots(database: Database) -> int:
    with database.read() as connection:
        return sum(chunks.live_slots(connection, KEY).values())


def _mark_dead_all_but(database: Database, live: str) -> None:
    with database.read() as connection:
        others = select(Worker.id).where(Worker.state == "ready", Worker.id != live)
        found = list(connection.execute(others).scalars())
    for worker in found:
        die(database, worker)


# At once.


def tick_in_child(go: Callable[[], None], url: str, broker_url: str, home: str) -> dict[str, Any]:
    """A process that has ticked for more than a lease, and then ticks in the instant of all."""
    now = 1000.0
    database = Database(url)
    settings = Settings.model_validate({"home": home, "lease_seconds": 45, "tick_seconds": 10})
    dispatcher = Dispatcher(database, settings, broker_url)
    keeper = Housekeeper(database, dispatcher, settings, clock=lambda: now)
    for _ in range(6):
        keeper.tick()
        now += 10
    go()
    report = keeper.tick()
    return {
        "dead": report.dead_workers,
        "completed": report.completed,
        "expired": report.expired,
        "orphan_rows": report.orphan_rows,
    }


def test_ten_housekeepers_at_once(
    database: Database, server: redis.Redis, broker_url: str, tmp_path: Path
) -> None:
    """Ten processes tick in one instant: what there is to do is done once."""
    ids = [make_job(database, 12, chunk_size=2) for _ in range(3)]
    dead = [make_worker(database) for _ in range(5)]
    for number in range(15):
        claim(database, dead[number % 5])
    done, overdue, orphan = [], [], []

    def make_work() -> None:
        done.append(make_job(database, 4))
        overdue.append(make_job(database, deadline=datetime.now(UTC) - timedelta(hours=1)))
        orphan.append(make_job(database, 5, storing=True))
        lapse(database, *dead)
        make_worker(database, slots=1)
        with database.write() as connection:
            connection.execute(
                update(Chunk).where(Chunk.job_id == done[0]).values(state="done", done=4)
            )
            connection.execute(
                update(Job).where(Job.id == orphan[0]).values(touched_at=db_now(-601))
            )
            connection.exec_driver_sql("UPDATE sweeps SET last_at = '2000-01-01 00:00:00.000000'")
        server.flushall()

    given = (url_of(database), broker_url, str(tmp_path / "home"))
    reports = at_once([(tick_in_child, given)] * 10, first=make_work)
    assert Counter(one for report in reports for one in report["dead"]) == Counter(dead)
    assert [one for report in reports for one in report["completed"]] == done
    assert [one for report in reports for one in report["expired"]] == overdue
    assert sum(report["orphan_rows"] for report in reports) == 6
    with database.read() as connection:
        states = Counter(connection.execute(select(Job.state)).scalars())
    assert states == {"running": 3, "expired": 1, "completed": 1}
    rows = [row for job_id in ids for row in job_chunks(database, job_id)]
    assert {row.state for row in rows} == {"queued"}
    assert sum(row.deaths for row in rows) == 15
    # All at once may publish too many, each up to two; never too few.
    assert 2 <= _waiting(server) <= 20
    work_off(database, make_worker(database))
    for job_id in ids:
        assert job(database, job_id).state == "completed"
        check_sums(database, job_id)


ROUNDS, ROUND_SECONDS = 25, 0.03


def end_chunks(go: Callable[[], None], url: str) -> list[str]:
    """Holds a chunk of each job and ends them one after the other; the jobs that it completed."""
    database = Database(url)
    worker = make_worker(database)
    saves = []
    for job_id in _open_jobs(database):
        held = claim(database, worker, only_job=job_id)
        rows = [result_row(index) for index, _ in pending_samples(database, held)]
        saves.append(as_save(held, rows, end="done"))
    go()
    # The clock is the same for all processes: so they meet anew for each job.
    start = (int(time.monotonic() / ROUND_SECONDS) + 5) * ROUND_SECONDS
    completed: list[str] = []
    for number, one in enumerate(saves):
        time.sleep(max(0.0, start + number * ROUND_SECONDS - time.monotonic()))
        completed += database.retrying(lambda c, s=one: results.save(c, worker, [s])).completed  # type: ignore[misc]
    return completed


def complete_all(go: Callable[[], None], url: str) -> list[str]:
    """Completes ended jobs, as each tick does, again and again."""
    database = Database(url)
    go()
    completed: list[str] = []
    while _open_jobs(database):
        completed += database.retrying(jobs.complete_all)
    return completed


def _open_jobs(database: Database) -> list[str]:
    with database.read() as connection:
        query = select(Job.id).where(Job.state.in_(OPEN_JOB_STATES)).order_by(Job.id)
        return list(connection.execute(query).scalars())


@pytest.mark.parametrize("beside", [(), (complete_all,)], ids=["alone", "beside a sweep"])
def test_two_workers_finish_the_last_two_chunks_together(
    database: Database, beside: tuple[Callable[..., Any], ...]
) -> None:
    """In two processes: each job is completed exactly once, with a sweep beside them or without."""
    ids = [make_job(database, 8) for _ in range(ROUNDS)]
    url = url_of(database)
    answers = at_once([(piece, (url,)) for piece in (end_chunks, end_chunks, *beside)])
    assert sorted(one for answer in answers for one in answer) == sorted(ids)
    for job_id in ids:
        assert job(database, job_id).state == "completed"
        assert check_sums(database, job_id)["done"] == 8
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(Job)).scalar_one() == ROUNDS


# How long recovery takes with the settings as they come.


@contextlib.contextmanager
def _cluster(database: Database, folder: Path) -> Iterator[WorkerCluster]:
    """Worker processes at default settings."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix="nightherd-redis-") as run:
        socket = Path(run) / "redis.sock"
        server = start_redis(socket)
        made = WorkerCluster(database, folder, server, f"redis+socket://{socket}?virtual_host=0")
        for name in ("LEASE", "RENEW", "TICK", "WATCH", "SAVE"):
            del made.variables[f"NIGHTHERD_{name}_SECONDS"]
        try:
            yield made
        finally:
            made.close()
            server.kill()
            server.wait()


def _all_on(cluster: WorkerCluster, chunks: int) -> Callable[[], bool]:
    """Whether all chunks run on the one worker that is ready and started last."""

    def look() -> bool:
        with cluster.database.read() as connection:
            newest = connection.execute(
                select(Worker.id).where(Worker.state == "ready").order_by(Worker.id.desc()).limit(1)
            ).scalar_one()
            running = select(func.count()).where(
                Chunk.state == "running", Chunk.worker_id == newest
            )
            return connection.execute(running).scalar_one() == chunks

    return look


def _recovery(cluster: WorkerCluster) -> dict[str, float]:
    """Seconds until the chunks of a drained worker, and of a dead one, run elsewhere."""
    took = {}
    first = cluster.start(step_seconds=0.1)
    job_id = store_job(
        cluster.database, [f"p{n}" for n in range(4)], chunk_size=1, params={"max_tokens": 4000}
    )
    cluster.publish_wakeups()
    wait_until(_all_on(cluster, 4), seconds=30, what="all chunks on the first worker")

    second = cluster.start(step_seconds=0.1)
    started = time.monotonic()
    first.terminate()
    wait_until(_all_on(cluster, 4), seconds=30, what="all chunks on the second worker")
    took["drained"] = time.monotonic() - started
    assert first.wait(10) == 0

    third = cluster.start(step_seconds=0.1)
    pause(DEFAULTS.lease_seconds + 2 * DEFAULTS.tick_seconds)  # until it may declare others dead
    started = time.monotonic()
    second.kill()
    wait_until(_all_on(cluster, 4), seconds=120, what="all chunks on the third worker")
    took["dead"] = time.monotonic() - started
    rows = job_chunks(cluster.database, job_id)
    assert [row.deaths for row in rows] == [1] * 4
    assert third.poll() is None
    return took


DEFAULTS = Settings()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_recovery_at_default_settings(
    sqlite_database: Database, postgresql: str, postgresql_template: str, tmp_path: Path
) -> None:
    """A drained worker's chunks go on at once, a dead one's after its lease and a tick."""
    assert (DEFAULTS.lease_seconds, DEFAULTS.tick_seconds) == (45, 10)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgresql_copy(postgresql, postgresql_template))
        other = Database(url)
        stack.callback(other.close)
        clusters = [
            stack.enter_context(_cluster(database, tmp_path / name))
            for database, name in ((sqlite_database, "sqlite"), (other, "postgresql"))
        ]
        with ThreadPoolExecutor(2) as pool:
            took = list(pool.map(_recovery, clusters))
    print(took)
    for each in took:
        assert each["drained"] <= 2, took
        assert each["dead"] <= DEFAULTS.lease_seconds + DEFAULTS.tick_seconds + 1, took
