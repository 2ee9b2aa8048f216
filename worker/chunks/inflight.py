"""The chunks that this worker has in flight: their claims, and the samples that the engine has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.store.chunks import Claim, Held
from models.store.results import ResultRow
from nightherd.errors import RowErrorCode
from worker.engine.interface import Engine, EngineRequest, Output, RequestHandle


@dataclass(slots=True)
class Counters:
    """A chunk's absolute counters, as its holder knows them."""

    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class ChunkRun:
    """One claimed chunk, from its claim to its end in SQL.

    Every sample that has no result yet is answered exactly once: with a result, or as aborted.
    When all are answered the writer ends the chunk: `done`, or `return` if anything was aborted.
    The fields from `expected` on belong to the writer's thread.
    """

    def __init__(self, claim: Claim, worker_id: str, engine: Engine) -> None:
        self.claim = claim
        self.worker_id = worker_id
        self.ended = threading.Event()
        """Set when the chunk's end is committed, or the chunk is not this worker's any more."""
        self.stored = False
        """Whether its end is in the database."""
        self._engine = engine
        self._lock = threading.Lock()
        self._handles: list[RequestHandle] = []
        self._aborting = False
        self._lost = False
        self.loaded = False
        """Whether the writer was told how many samples to expect; belongs to the task's thread."""
        self.expected: int | None = None
        """Samples to be answered; None until they are loaded."""
        self.answered = 0
        self.aborted = 0
        self.unsaved: list[ResultRow] = []
        self.counters = Counters(
            claim.done, claim.failed, claim.prompt_tokens, claim.completion_tokens
        )

    @property
    def lost(self) -> bool:
        """The chunk is another worker's by now: nothing more of it may be written."""
        return self._lost

    @property
    def engine_broke(self) -> bool:
        """Then what was aborted may be the cause: it counts as a death, and is not returned."""
        return self._engine.broken is not None

    @property
    def aborting(self) -> bool:
        return self._aborting

    def add(self, request: EngineRequest, on_output: Callable[[int, Output], None]) -> bool:
        """Hands a request to the engine; False if the chunk is being aborted.

        `on_output` is called with the index of the sample's seed and its output, from the
        engine's thread: it must be quick.
        """
        with self._lock:
            if self._aborting:
                return False
            handle = self._engine.add(request)
            self._handles.append(handle)
        for index, future in enumerate(handle.futures):
            future.add_done_callback(
                lambda done, index=index: on_output(index, done.result())  # type: ignore[misc]
            )
        return True

    def abort(self, *, lost: bool = False) -> None:
        """Ends what runs: every open sample is answered as aborted. Idempotent."""
        with self._lock:
            self._lost = self._lost or lost
            if self._aborting:
                return
            self._aborting = True
            handles = self._handles
            self._handles = []
        self._engine.abort(handles)


class InFlight:
    """The registry of running chunks.

    `claim_lock` is held over each claim and each comparison with SQL: so a chunk that was claimed a
    moment ago, and is not registered yet, is not mistaken for one whose claim's answer was lost.
    """

    def __init__(self) -> None:
        self.claim_lock = threading.Lock()
        self._runs: dict[int, ChunkRun] = {}
        self._closed = False

    def register(self, run: ChunkRun) -> None:
        """With `claim_lock` held."""
        self._runs[run.claim.chunk_id] = run
        if self._closed:
            run.abort()

    def forget(self, run: ChunkRun) -> None:
        if self._runs.get(run.claim.chunk_id) is run:
            del self._runs[run.claim.chunk_id]

    def runs(self) -> Sequence[ChunkRun]:
        return list(self._runs.values())

    @property
    def isolated(self) -> bool:
        """Whether a chunk runs that must run alone."""
        return any(run.claim.isolated for run in self.runs())

    def close(self) -> None:
        """Aborts all runs, and from now on each that is registered. Idempotent."""
        self._closed = True
        self.abort_all()

    def abort_all(self, *, lost: bool = False) -> None:
        for run in self.runs():
            run.abort(lost=lost)

    def reconcile(self, worker_id: str, held: dict[int, Held]) -> dict[int, Held]:
        """Aborts the runs that, by `held` in SQL, are another worker's or not wanted any more.

        Returns the chunks in `held` that have no run here. With `claim_lock` held.
        """
        runs = {run.claim.chunk_id: run for run in self.runs()}
        for chunk_id, run in runs.items():
            if run.ended.is_set():
                continue
            row = held.get(chunk_id)
            if row is None or row.fence != run.claim.fence or run.worker_id != worker_id:
                run.abort(lost=True)
            elif not row.wanted:
                run.abort()
        return {chunk_id: row for chunk_id, row in held.items() if chunk_id not in runs}


def error_row(
    *,
    index: int,
    sample: int,
    code: RowErrorCode,
    message: str,
    prompt_tokens: int = 0,
    **more: Any,
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
