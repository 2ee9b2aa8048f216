"""Many small requests, three workers, and a random fault every few seconds, for a long while.

`python -m tests.faults.soak --requests 200000 --minutes 20`: nothing may be lost, doubled or
unexpected, no process may grow, and the queues must be empty in the end. It says what it does on
standard error, prints one line of JSON, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import text

from models.job import ENDED_JOB_STATES
from tests.faults.conftest import Fleet, Process, RedisServer
from tests.faults.killing import own_postgresql
from tests.faults.oracle import Fault

WORKERS = 3
SEQUENCES = 64
LENGTHS = (2, 14, 5, 11, 8, 3, 13, 6, 10)
"""Tokens, in turn: so that at any moment some have finished and are not saved."""
JOBS = 10
WARM_UP = 30.0
"""Seconds after its start during which a process may grow."""
MEMORY_MIB = 30.0
"""What a process may grow by afterwards."""


class Memory:
    """The resident memory of each process, over its life."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def measure(self, processes: list[Process]) -> None:
        for process in processes:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                size = next(line for line in status.splitlines() if line.startswith("VmRSS"))
                self._seen[process.pid].append((time.monotonic(), int(size.split()[1]) / 1024))

    def growth(self) -> float:
        """The most that any process grew by, in MiB: from its warm state to its end."""
        grown = [0.0]
        for seen in self._seen.values():
            warm = [size for at, size in seen if at - seen[0][0] > WARM_UP]
            if len(warm) >= 8:
                part = len(warm) // 4
                grown.append(statistics.median(warm[-part:]) - statistics.median(warm[:part]))
        return max(grown)


class Soak:
    """The fleet, the faults, and what came of it."""

    def __init__(self, fleet: Fleet, moments: random.Random, step_seconds: float) -> None:
        self.fleet = fleet
        self.moments = moments
        self.step_seconds = step_seconds
        self.workers: list[Process] = []
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory = Memory()
        self.faults: dict[str, Callable[[], None]] = {
            "kill -9": self.kill_9,
            "SIGTERM": self.terminate,
            "SIGSTOP past the lease": self.stop_past_the_lease,
            "redis killed": self.kill_redis,
            "FLUSHALL": lambda: self.fleet.redis.do("FLUSHALL"),
            "CLIENT KILL": lambda: self.fleet.redis.do("CLIENT", "KILL", "TYPE", "normal"),
            "pg_terminate_backend": self.cut_database,
        }

    def start_worker(self) -> None:
        self.workers.append(
            self.fleet.start(ready=False, step_seconds=self.step_seconds, max_sequences=SEQUENCES)
        )

    def a_worker(self) -> Process:
        return self.moments.choice(self.workers)

    # The faults.

    def kill_9(self) -> None:
        victim = self.a_worker()
        hit = self.fleet.unsaved_by(victim)
        victim.kill()
        victim.wait()
        self.fleet.faults.append(Fault(time.monotonic(), hit))
        self.replace(victim)

    def terminate(self) -> None:
        victim = self.a_worker()
        hit = self.fleet.unsaved_by(victim)
        at = time.monotonic()
        victim.terminate()
        code = victim.wait(60)
        if code != 0 or time.monotonic() - at > 10:
            self.wrong.append(f"a drain took {time.monotonic() - at:.1f} s and exited with {code}")
        self.fleet.faults.append(Fault(at, hit - self.fleet.saved()))
        self.replace(victim)

    def stop_past_the_lease(self) -> None:
        victim = self.a_worker()
        hit = self.fleet.unsaved_by(victim)
        victim.send_signal(signal.SIGSTOP)
        self.fleet.faults.append(Fault(time.monotonic(), hit))
        self.watch(self.moments.uniform(3.0, 8.0))
        victim.send_signal(signal.SIGCONT)

    def kill_redis(self) -> None:
        self.fleet.redis.kill()
        self.watch(self.moments.uniform(0.0, 5.0))
        self.fleet.redis.start()

    def cut_database(self) -> None:
        self.fleet.column(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )

    # The course of things.

    def replace(self, victim: Process) -> None:
        self.workers.remove(victim)
        self.start_worker()

    def watch(self, seconds: float) -> None:
        """Lets time pass, and looks after the processes; ends early once all jobs have ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.ended():
            self.memory.measure(self.fleet.processes)
            for worker in [worker for worker in self.workers if worker.poll() is not None]:
                self.wrong.append(f"a worker ended by itself, with {worker.returncode}")
                self.replace(worker)
            time.sleep(1.0)

    def ended(self) -> bool:
        return all(self.fleet.state(job) in ENDED_JOB_STATES for job in self.fleet.submitted)

    def run(self, requests: int, every: float, patience: float) -> dict[str, Any]:
        fleet = self.fleet
        self.start_processes()
        for number in range(JOBS):
            count = requests // JOBS + (number < requests % JOBS)
            prompts = [f"request {number}.{index}" for index in range(count)]
            lengths = [LENGTHS[index % len(LENGTHS)] for index in range(count)]
            fleet.submit(prompts, max_tokens=lengths, chunk_size=64)
        started = time.monotonic()
        while not self.ended() and time.monotonic() - started < patience:
            self.watch(self.moments.uniform(0.5, 1.5) * every)
            if not self.ended():
                name = self.moments.choice(list(self.faults))
                _say(f"{time.monotonic() - started:6.0f} s  {fleet.progress():,} done  {name}")
                self.faults[name]()
                self.done[name] += 1
        seconds = time.monotonic() - started
        return self.verdict(requests, seconds)

    def start_processes(self) -> None:
        self.fleet.start_beat()
        for _ in range(WORKERS):
            self.start_worker()
        self.fleet.wait_until_ready(*self.workers)

    def verdict(self, requests: int, seconds: float) -> dict[str, Any]:
        fleet = self.fleet
        deadline = time.monotonic() + 30
        while fleet.redis.wake_ups() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = fleet.redis.wake_ups()
        verdict = fleet.judge()
        grown = self.memory.growth()
        if grown > MEMORY_MIB:
            self.wrong.append(f"a process grew by {grown:.0f} MiB")
        if left:
            self.wrong.append(f"{left} wake-ups are left")
        for line in [*verdict.unexpected[:20], *self.wrong]:
            _say(line)
        return {
            "requests": requests,
            "seconds": round(seconds, 1),
            "per_second": round(verdict.ok / seconds, 1),
            "faults": dict(self.done),
            "ok": verdict.ok,
            "lost": len(verdict.lost),
            "duplicated": len(verdict.duplicated),
            "unexpected": len(verdict.unexpected),
            "wrong": self.wrong,
            "recomputed": verdict.recomputed,
            "worst_recovery_seconds": verdict.recovery and round(verdict.recovery, 1),
            "memory_growth_mib": round(grown, 1),
            "wake_ups_left": left,
        }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long it shall last")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    seconds = given.minutes * 60
    # The model is slowed so that three workers at four fifths of their time take as long.
    steps = given.requests * statistics.mean(LENGTHS) / (SEQUENCES * WORKERS)
    with tempfile.TemporaryDirectory(prefix="nightherd-soak-") as name:
        folder = Path(name)
        redis = RedisServer(folder)
        redis.start()
        with own_postgresql() as (_, database):
            fleet = Fleet(database, folder, redis)
            try:
                soak = Soak(fleet, random.Random(given.seed), 0.8 * seconds / steps)
                card = soak.run(given.requests, given.every, patience=3 * seconds + 120)
            finally:
                fleet.close()
                redis.kill()
    print(json.dumps(card))
    bad = card["lost"] or card["duplicated"] or card["unexpected"] or card["wrong"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
