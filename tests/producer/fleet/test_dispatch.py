"""Wake-ups: just enough of them in a real Redis, from what SQL says is queued."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from models.database import Database
from models.store import jobs
from nightherd.errors import BrokerError
from nightherd.queue import KEY_PREFIX, queue_name
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from tests.seeding import KEY, claim, make_job, make_worker, statements, work_off

MakeSettings = Callable[..., Settings]


@pytest.fixture
def server(redis_socket: Path) -> Iterator[redis.Redis]:
    client = redis.Redis(unix_socket_path=str(redis_socket))
    yield client
    client.close()


@pytest.fixture
def dispatcher(
    sqlite_database: Database, make_settings: MakeSettings, broker_url: str
) -> Dispatcher:
    return Dispatcher(sqlite_database, make_settings(), broker_url)


def waiting(server: redis.Redis, key: str = KEY, only_job: str | None = None) -> int:
    return int(server.llen(KEY_PREFIX + queue_name(key, only_job)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chunks", "slots", "messages"),
    [
        (0, (), 0),
        (1, (), 1),
        (9, (), 1),
        (9, (4,), 8),
        (9, (4, 4), 9),
        (3, (4, 4), 3),
        (9, (1,), 2),
    ],
)
def test_as_many_as_workers_can_use(
    sqlite_database: Database,
    dispatcher: Dispatcher,
    server: redis.Redis,
    chunks: int,
    slots: tuple[int, ...],
    messages: int,
) -> None:
    """min(queued chunks, max(1, 2 × live slots)), however often it is asked for."""
    if chunks:
        make_job(sqlite_database, chunks, chunk_size=1)
    for count in slots:
        make_worker(sqlite_database, slots=count)
    assert [dispatcher.top_up(KEY) for _ in range(3)] == [messages, 0, 0]
    assert waiting(server) == messages


def test_what_was_taken_is_filled_up(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    make_job(sqlite_database, 20, chunk_size=1)
    make_worker(sqlite_database, slots=3)
    assert dispatcher.top_up(KEY) == 6
    for _ in range(4):
        server.lpop(KEY_PREFIX + queue_name(KEY))
    assert dispatcher.top_up(KEY) == 4
    server.flushall()
    assert dispatcher.top_up(KEY) == 6


def test_dead_workers_and_other_checkpoints_count_for_nothing(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    make_job(sqlite_database, 20, chunk_size=1)
    make_worker(sqlite_database, slots=9, lease_seconds=-1)
    make_worker(sqlite_database, slots=9, state="stopped")
    make_worker(sqlite_database, slots=9, key="another")
    assert dispatcher.top_up(KEY) == 1
    assert dispatcher.top_up("another") == 0
    make_worker(sqlite_database, slots=1, key="another", serves=(KEY,))
    assert dispatcher.top_up(KEY) == 1
    assert waiting(server) == 2
    assert waiting(server, "another") == 0


def test_nothing_for_jobs_that_may_not_be_claimed(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    job_id = make_job(sqlite_database, 4)
    with sqlite_database.write() as connection:
        jobs.pause(connection, job_id)
    assert dispatcher.top_up(KEY) == 0
    with sqlite_database.write() as connection:
        jobs.resume(connection, job_id)
    assert dispatcher.top_up(KEY) == 1
    work_off(sqlite_database, make_worker(sqlite_database))
    server.flushall()
    assert dispatcher.top_up(KEY) == 0


def test_workers_of_one_job_have_a_queue_of_their_own(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    first = make_job(sqlite_database, 20, chunk_size=1)
    second = make_job(sqlite_database, 3, chunk_size=1)
    make_worker(sqlite_database, slots=4, only_job=second)
    assert dispatcher.top_up(KEY) == 1 + 3
    assert (waiting(server), waiting(server, KEY, second)) == (1, 3)
    make_worker(sqlite_database, slots=2, only_job=first)
    make_worker(sqlite_database, slots=2)
    assert dispatcher.top_up(KEY) == 4 + 3
    assert waiting(server, KEY, first) == 4
    assert waiting(server) == 4
    assert dispatcher.top_up(KEY) == 0


def test_redis_holds_a_few_messages_however_many_chunks_wait(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    make_job(sqlite_database, 2_000, chunk_size=1)
    make_worker(sqlite_database, slots=4)
    for _ in range(20):
        dispatcher.top_up(KEY)
    assert waiting(server) == 8
    assert server.dbsize() <= 3
    for name in server.scan_iter():
        assert name.startswith(KEY_PREFIX.encode()), name
        assert server.type(name) == b"list", "no binding tables"


def test_a_message_names_the_checkpoint_and_no_chunk(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    job_id = make_job(sqlite_database, 1)
    dispatcher.top_up(KEY)
    message = server.lpop(KEY_PREFIX + queue_name(KEY))
    assert isinstance(message, bytes)
    assert b"nightherd.wake" in message
    assert job_id.encode() not in message
    assert len(message) < 1500


def test_many_threads_and_dispatchers_at_once(
    sqlite_database: Database, make_settings: MakeSettings, broker_url: str, server: redis.Redis
) -> None:
    """A few too many at worst: each costs an empty look."""
    make_job(sqlite_database, 50, chunk_size=1)
    make_worker(sqlite_database, slots=4)
    settings = make_settings()
    all_of_them = [Dispatcher(sqlite_database, settings, broker_url) for _ in range(2)]
    start = threading.Barrier(4)

    def publish(number: int) -> int:
        start.wait()
        return all_of_them[number % 2].top_up(KEY)

    with ThreadPoolExecutor(4) as pool:
        published = sum(pool.map(publish, range(4)))
    assert waiting(server) == published
    assert 8 <= published <= 16
    assert all_of_them[0].top_up(KEY) == 0


def test_what_it_asks_of_the_database(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    make_job(sqlite_database, 4)
    claim(sqlite_database, make_worker(sqlite_database))
    with statements(sqlite_database) as seen:
        dispatcher.top_up(KEY)
    assert len([one for one in seen if one != "BEGIN"]) == 2


# A broker that does not do its part.


def refused_after(dispatcher: Dispatcher) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(BrokerError) as refusal:
        dispatcher.top_up(KEY)
    return str(refusal.value), time.monotonic() - start


def test_a_broker_that_is_down_is_said_at_once(
    sqlite_database: Database, make_settings: MakeSettings, tmp_path: Path
) -> None:
    make_job(sqlite_database, 4)
    for url in ("redis://:s3cret@127.0.0.1:1/0", f"redis+socket://{tmp_path}/no.sock"):
        message, seconds = refused_after(Dispatcher(sqlite_database, make_settings(), url))
        assert seconds < 3
        assert "s3cret" not in message
        assert "\n" not in message


def test_a_broker_that_is_not_needed_is_not_asked(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    assert Dispatcher(sqlite_database, make_settings(), "redis://127.0.0.1:1/0").top_up(KEY) == 0


def test_a_broker_that_hears_and_does_not_answer(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """As one that is stopped, or half a connection."""
    import socket

    make_job(sqlite_database, 4)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        settings = make_settings(broker_timeout=0.5)
        _, seconds = refused_after(Dispatcher(sqlite_database, settings, url))
    assert seconds < 3


def test_a_broker_that_is_full(
    sqlite_database: Database, dispatcher: Dispatcher, server: redis.Redis
) -> None:
    make_job(sqlite_database, 4)
    server.config_set("maxmemory", "1")
    message, seconds = refused_after(dispatcher)
    assert seconds < 3
    assert "maxmemory" in message
    server.config_set("maxmemory", "0")
    assert dispatcher.top_up(KEY) == 1


def test_a_broker_that_comes_back(
    sqlite_database: Database, make_settings: MakeSettings, redis_socket: Path
) -> None:
    """The same dispatcher goes on with it: it holds no connection."""
    make_job(sqlite_database, 4)
    url = f"redis+socket://{redis_socket}?virtual_host=0"
    dispatcher = Dispatcher(sqlite_database, make_settings(), url)
    assert dispatcher.top_up(KEY) == 1
    client = redis.Redis(unix_socket_path=str(redis_socket))
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    client.flushall()
    client.close()
    assert dispatcher.top_up(KEY) == 1
