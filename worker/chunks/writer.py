"""The writer: one thread that turns outputs into rows and saves them, all chunks together."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from models.database import Database
from models.store import results as store
from models.store.results import ChunkSave, ResultRow
from nightherd.errors import RowErrorCode
from nightherd.log import OncePerState
from nightherd.settings import Settings
from nightherd.text import TextProcessor
from worker.chunks.inflight import ChunkRun, error_row
from worker.chunks.prepare import PreparedRequest
from worker.engine.interface import Output
from worker.text.detokenizer import to_result

T = TypeVar("T")

log = logging.getLogger("nightherd.writer")

_SAVE_ATTEMPTS = 3
_REFUSED_PAUSE = 2.0
_REMEMBERED_SETS = 10_000


@dataclass(frozen=True, slots=True)
class _Loaded:
    """How many samples of a chunk are to be answered; none, where all have results already."""

    run: ChunkRun
    expected: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """One sample's output; None where the request failed before it reached the engine."""

    run: ChunkRun
    request: PreparedRequest
    sample: int
    seed: int | None
    output: Output | None


@dataclass(frozen=True, slots=True)
class _Aborted:
    """Samples that never reached the engine."""

    run: ChunkRun
    count: int


class Writer:
    """Saves every `save_samples` samples, every `save_seconds`, and at the end of each chunk.

    The database may be away for as long as it likes: results wait in memory, bounded by the slots.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        text: TextProcessor,
        provenance: Mapping[str, Any],
        *,
        on_ended: Callable[[ChunkRun, Sequence[str]], None],
        on_broken: Callable[[str], None],
        database_time: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._settings = settings
        self._text = text
        self._provenance = provenance
        self._on_ended = on_ended
        self._on_broken = on_broken
        self._database_time = database_time
        self._inbox: queue.SimpleQueue[_Loaded | _Answer | _Aborted | None] = queue.SimpleQueue()
        self._dirty: set[ChunkRun] = set()
        self._dirty_since: float | None = None
        self._parameter_sets: dict[str, str] = {}
        self._stored_sets: set[str] = set()
        self._provenance_stored = False
        self._give_up = threading.Event()
        self._database_down = OncePerState(log)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Saves what is there and ends the thread; False if that took longer than `timeout`."""
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Waits no longer for the database: what is unsaved will be computed again."""
        self._give_up.set()

    # Called from any thread, the engine's included: they only put things into the inbox.

    def loaded(self, run: ChunkRun, expected: int) -> None:
        """The chunk ends when so many samples have been answered or aborted."""
        self._inbox.put(_Loaded(run, expected))

    def answer(
        self,
        run: ChunkRun,
        request: PreparedRequest,
        sample: int,
        seed: int | None,
        output: Output | None,
    ) -> None:
        """One sample's output, also an aborted one; None for the error of the request."""
        self._inbox.put(_Answer(run, request, sample, seed, output))

    def aborted(self, run: ChunkRun, count: int) -> None:
        """So many samples never reached the engine."""
        self._inbox.put(_Aborted(run, count))

    # The writer's thread.

    def _run(self) -> None:
        try:
            self._handle_inbox()
        except Exception as error:
            # A bug. Without this thread no chunk would ever end, and nobody would notice.
            log.exception("the writer broke")
            self._on_broken(f"the writer: {error!r}")

    def _handle_inbox(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=self._seconds_until_save())
            except queue.Empty:
                self._save()
                continue
            if item is None:
                self._save()
                return
            self._handle(item)
            if self._save_is_due():
                self._save()

    def _seconds_until_save(self) -> float | None:
        """None where there is nothing to save."""
        if self._dirty_since is None:
            return None
        return max(0.0, self._dirty_since + self._settings.save_seconds - time.monotonic())

    def _save_is_due(self) -> bool:
        if not self._dirty:
            return False
        unsaved = sum(len(run.unsaved) for run in self._dirty)
        ending = any(_is_answered(run) for run in self._dirty)
        # While more answers are waiting, one commit can take them all; the count bounds it.
        return (
            unsaved >= self._settings.save_samples
            or self._seconds_until_save() == 0
            or (ending and self._inbox.empty())
        )

    def _handle(self, item: _Loaded | _Answer | _Aborted) -> None:
        run = item.run
        if isinstance(item, _Loaded):
            run.expected = item.expected
        elif isinstance(item, _Aborted):
            run.answered += item.count
            run.aborted += item.count
        else:
            run.answered += 1
            if item.output is not None and item.output.finish_reason == "aborted":
                run.aborted += 1
            elif not run.lost:
                self._add_result(run, self._result_row(item))
        self._dirty.add(run)
        if self._dirty_since is None:
            self._dirty_since = time.monotonic()

    def _add_result(self, run: ChunkRun, row: ResultRow) -> None:
        run.unsaved.append(row)
        if row["error_code"] is not None:
            run.counters.failed += 1
            return
        run.counters.done += 1
        run.counters.completion_tokens += row["completion_tokens"]
        if row["sample"] == 0:
            run.counters.prompt_tokens += row["prompt_tokens"]

    def _result_row(self, item: _Answer) -> dict[str, Any]:
        request = item.request
        if request.parameter_set is not None:
            self._parameter_sets[request.parameter_set[0]] = request.parameter_set[1]
        facts = {
            "seed": item.seed,
            "worker_id": item.run.worker_id,
            "parameter_set_id": request.parameter_set[0] if request.parameter_set else None,
            "provenance_id": self._provenance["id"],
        }
        failed = {
            "index": request.index,
            "sample": item.sample,
            "prompt_tokens": request.prompt_tokens,
        }
        if item.output is None or request.params is None:
            reason = request.error
            code: RowErrorCode = reason.code if reason else "engine_error"
            message = reason.message if reason else ""
            return error_row(code=code, message=_storable(message), **failed, **facts)
        try:
            result = to_result(item.output, self._text, request.params, request.prompt_tail)
        except Exception as error:
            # A tokenizer that cannot decode its own ids fails this row, not the worker.
            log.exception("row %d of job %s: no text", request.index, item.run.claim.job_id)
            message = f"its tokens cannot be turned into text: {error}"
            return error_row(code="engine_error", message=_storable(message), **failed, **facts)
        return {
            **failed,
            **facts,
            **self._times(item.output),
            "text": None if result.text is None else _storable(result.text),
            "finish_reason": result.finish_reason,
            "stop_reason": None
            if result.stop_reason is None
            else _storable(str(result.stop_reason)),
            "completion_tokens": result.completion_tokens,
            "logprobs": result.logprobs,
            "error_code": result.error_code,
            "error_message": None
            if result.error_message is None
            else _storable(result.error_message),
        }

    def _times(self, output: Output) -> dict[str, Any]:
        """The engine's monotonic times on the database's clock."""
        if not output.started or not output.finished:
            return {"started_at": None, "finished_at": None, "seconds": None}
        now, monotonic = self._database_time(), time.monotonic()
        return {
            "started_at": now - timedelta(seconds=monotonic - output.started),
            "finished_at": now - timedelta(seconds=monotonic - output.finished),
            "seconds": round(output.finished - output.started, 6),
        }

    def _save(self) -> None:
        runs = sorted(self._dirty, key=lambda run: run.claim.chunk_id)
        self._dirty, self._dirty_since = set(), None
        by_worker: dict[str, list[ChunkRun]] = {}
        for run in runs:
            if run.lost:
                self._drop(run)
            elif run.unsaved or _is_answered(run):
                by_worker.setdefault(run.worker_id, []).append(run)
        for worker_id, group in by_worker.items():
            self._save_group(worker_id, group)

    def _save_group(self, worker_id: str, group: Sequence[ChunkRun]) -> None:
        for _ in range(_SAVE_ATTEMPTS):
            try:
                self._store_facts()
                outcome = self._commit(worker_id, group)
            except Exception as error:
                if self._give_up.is_set():
                    log.error(
                        "unsaved results are given up, to be computed again: %s",
                        _driver_message(error),
                    )
                    break
                if len(group) > 1:
                    for run in group:
                        self._save_group(worker_id, [run])
                    return
                log.error("the database refuses to save: %s", _driver_message(error))
                if not self._isolate_refused_rows(group[0]):
                    break
            else:
                self._after_save(group, outcome)
                return
        for run in group:
            log.error("chunk %d is dropped", run.claim.chunk_id)
            run.abort(lost=True)
            self._drop(run)

    def _after_save(self, group: Sequence[ChunkRun], outcome: store.SaveOutcome) -> None:
        completed = outcome.completed
        for run in group:
            run.unsaved = []
            if run.claim.chunk_id in outcome.lost:
                log.warning("chunk %d is not ours any more; dropped", run.claim.chunk_id)
                run.abort(lost=True)
                self._drop(run)
            elif _is_answered(run):
                run.stored = True
                self._on_ended(run, completed)
                run.ended.set()
                completed = ()

    def _commit(self, worker_id: str, group: Sequence[ChunkRun]) -> store.SaveOutcome:
        saves = [_as_save(run) for run in group]

        def work(connection: Connection) -> store.SaveOutcome:
            return store.save(connection, worker_id, saves)

        return self._retrying(work)

    def _retrying(self, work: Callable[[Connection], T]) -> T:
        outcome = self._database.retrying(
            work,
            patience=float("inf"),
            stop=self._give_up,
            on_wait=lambda error: self._database_down.begin("%s; results wait in memory", error),
        )
        self._database_down.end("the database answers again")
        return outcome

    def _store_facts(self) -> None:
        """Parameter sets and provenance, each once, in transactions of their own before results."""
        if not self._provenance_stored:
            self._retrying(lambda c: store.store_provenance(c, self._provenance))
            self._provenance_stored = True
        for set_id in sorted(self._parameter_sets.keys() - self._stored_sets):
            # Out of the list first: one that is refused for good fails its own rows only.
            params = json.loads(self._parameter_sets.pop(set_id))
            self._retrying(
                lambda c, i=set_id, p=params: store.store_parameter_set(c, i, p)  # type: ignore[misc]
            )
            if len(self._stored_sets) >= _REMEMBERED_SETS:
                self._stored_sets.clear()
            self._stored_sets.add(set_id)
        self._parameter_sets.clear()

    def _isolate_refused_rows(self, run: ChunkRun) -> bool:
        """Finds the rows that the database refuses, and makes them failures.

        False where it refuses the chunk without any row, and waiting does not help.
        """
        while (refusal := self._refusal(run, [])) is not None:
            if self._give_up.is_set() or isinstance(refusal, IntegrityError):
                log.error(
                    "chunk %d cannot be saved: %s", run.claim.chunk_id, _driver_message(refusal)
                )
                return False
            # Not the rows: it takes no write at all (read-only, a lost permission). Somebody will
            # repair that, and the results are worth the wait.
            self._database_down.begin("%s; results wait in memory", _driver_message(refusal))
            self._give_up.wait(_REFUSED_PAUSE)
        rows = [
            row if self._refusal(run, [row]) is None else _as_refused(run, row)
            for row in run.unsaved
        ]
        if self._give_up.is_set():
            return False
        run.unsaved = rows
        return True

    def _refusal(self, run: ChunkRun, rows: Sequence[ResultRow]) -> Exception | None:
        """Why the database does not take these rows, tried in a transaction that is rolled back."""
        save = _as_save(run)
        save.results, save.end = rows, None

        def work(connection: Connection) -> None:
            store.save(connection, run.worker_id, [save])
            raise _RollBack

        try:
            self._retrying(work)
        except _RollBack:
            return None
        except Exception as error:
            return error
        raise AssertionError  # `work` always raises

    def _drop(self, run: ChunkRun) -> None:
        run.unsaved = []
        if _is_answered(run) and not run.ended.is_set():
            self._on_ended(run, ())
            run.ended.set()


class _RollBack(Exception):
    pass


def _is_answered(run: ChunkRun) -> bool:
    return run.expected is not None and run.answered >= run.expected


def _as_save(run: ChunkRun) -> ChunkSave:
    claim, counters = run.claim, run.counters
    save = ChunkSave(
        chunk_id=claim.chunk_id,
        job_id=claim.job_id,
        fence=claim.fence,
        pass_=claim.pass_,
        done=counters.done,
        failed=counters.failed,
        prompt_tokens=counters.prompt_tokens,
        completion_tokens=counters.completion_tokens,
        results=run.unsaved,
    )
    if _is_answered(run):
        if not run.aborted:
            save.end = "done"
        elif not run.engine_broke:
            save.end = "return"
    return save


def _as_refused(run: ChunkRun, row: ResultRow) -> ResultRow:
    """The same row as a failure, with the counters put right."""
    if row["error_code"] is None:
        run.counters.done -= 1
        run.counters.failed += 1
        run.counters.completion_tokens -= row["completion_tokens"]
        if row["sample"] == 0:
            run.counters.prompt_tokens -= row["prompt_tokens"]
    return error_row(
        index=row["index"],
        sample=row["sample"],
        code="engine_error",
        message="the database refused this row's result; see the worker's log",
    )


def _driver_message(error: Exception) -> str:
    """The driver's own words: SQLAlchemy's hold the statement and all its values."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _storable(text: str) -> str:
    """Text that every database takes: no NUL (PostgreSQL), no half of a surrogate pair (UTF-8)."""
    text = text.replace("\x00", "\ufffd")
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
