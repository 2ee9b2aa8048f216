"""The chunks that this worker has in flight: who holds what, under which fence, and its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.store.chunks import Claim, Held
from models.store.results import ResultRow
from worker.engine.interface import Engine, EngineRequest, Generation, Output


@dataclass(slots=True)
class Counters:
    """A chunk's absolute counters, as its holder knows them."""

    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class ChunkRun:
    """One claimed chunk, from its claim to its end in SQL.

    Every sample that it owes is answered exactly once: with a result, or as aborted. When all are
    answered the writer ends the chunk: `done`, or `return` if anything was aborted. The fields
    below `answered` belong to the writer's thread.
    """

    def __init__(self, claim: Claim, worker_id: str, engine: Engine) -> None:
        self.claim = claim
        self.worker_id = worker_id
        self.ended = threading.Event()
        self.stored = False
        """Whether its end is in the database."""
        """Set when the chunk's end is committed, or the chunk is not this worker's any more."""
        self._engine = engine
        self._lock = threading.Lock()
        self._generations: list[Generation] = []
        self._aborting = False
        self._lost = False
        self.loaded = False
        """Whether the writer was told what is owed; belongs to the task's thread."""
        self.owed: int | None = None
        """Samples to be answered; None until they are loaded."""
        self.answered = 0
        self.aborted = 0
        self.unsaved: list[ResultRow] = []
        self.counters = Counters(
            claim.done, claim.failed, claim.prompt_tokens, claim.completion_tokens
        )

    @property
    def lost(self) -> bool:
        """The fence has passed to another: nothing more of it may be written."""
        return self._lost

    @property
    def engine_broke(self) -> bool:
        """What was aborted may have broken the engine: that is a death, not a return."""
        return self._engine.broken is not None

    @property
    def aborting(self) -> bool:
        return self._aborting

    def add(self, request: EngineRequest, on_output: Callable[[int, Output], None]) -> bool:
        """Hands a request to the engine; False if the chunk is being aborted.

        `on_output` is called with the place of the sample's seed and its output, from the
        engine's thread: it must be quick.
        """
        with self._lock:
            if self._aborting:
                return False
            generation = self._engine.add(request)
            self._generations.append(generation)
        for place, future in enumerate(generation.futures):
            future.add_done_callback(
                lambda done, place=place: on_output(place, done.result())  # type: ignore[misc]
            )
        return True

    def abort(self, *, lost: bool = False) -> None:
        """Ends what runs: every open sample is answered as aborted. Idempotent."""
        with self._lock:
            self._lost = self._lost or lost
            if self._aborting:
                return
            self._aborting = True
            generations = self._generations
            self._generations = []
        self._engine.abort(generations)


class InFlight:
    """The registry of running chunks. `gate` is held over each claim and each comparison with SQL.

    So nobody mistakes a chunk that was claimed a moment ago, and is not registered yet, for one
    whose claim's answer was lost.
    """

    def __init__(self) -> None:
        self.gate = threading.Lock()
        self._runs: dict[int, ChunkRun] = {}
        self._closed = False

    def register(self, run: ChunkRun) -> None:
        """Under the gate."""
        self._runs[run.claim.chunk_id] = run
        if self._closed:
            run.abort()

    def forget(self, run: ChunkRun) -> None:
        if self._runs.get(run.claim.chunk_id) is run:
            del self._runs[run.claim.chunk_id]

    def runs(self) -> Sequence[ChunkRun]:
        return list(self._runs.values())

    @property
    def solo(self) -> bool:
        """Whether a chunk runs that tolerates nothing beside it."""
        return any(run.claim.solo for run in self.runs())

    def close(self) -> None:
        """Aborts all runs, and from now on each that is registered. Idempotent."""
        self._closed = True
        self.abort_all()

    def abort_all(self, *, lost: bool = False) -> None:
        for run in self.runs():
            run.abort(lost=lost)

    def compare(self, worker_id: str, held: dict[int, Held]) -> dict[int, Held]:
        """Under the gate: aborts what is not held or not wanted; returns what nobody here knows."""
        runs = {run.claim.chunk_id: run for run in self.runs()}
        for chunk_id, run in runs.items():
            if run.ended.is_set():
                continue
            theirs = held.get(chunk_id)
            if theirs is None or theirs.fence != run.claim.fence or run.worker_id != worker_id:
                run.abort(lost=True)
            elif not theirs.wanted:
                run.abort()
        return {chunk_id: theirs for chunk_id, theirs in held.items() if chunk_id not in runs}


def error_row(
    *, index: int, sample: int, code: str, message: str, prompt_tokens: int = 0, **more: Any
) -> dict[str, Any]:
    """The result row of a sample that failed."""
    return {
        "index": index,
        "sample": sample,
        "text": None,
        "finish_reason": "error",
        "stop_reason": None,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 0,
        "logprobs": None,
        "error_code": code,
        "error_message": message,
        "seed": None,
        "worker_id": None,
        "parameter_set_id": None,
        "provenance_id": None,
        "started_at": None,
        "finished_at": None,
        "seconds": None,
        **more,
    }
