"""Serves as `nightherd worker` does, in a process of its own, with faults on demand.

All is real but the model: `LetterRunner` stands below the real engine, scheduler and block manager,
and its next token is a hash of the seed and the tokens before it. So the text of every sample is
known in advance, whatever happens to workers: `text_of`.

`python -m tests.faults.serve OPTIONS`: the fields of `Options`, as one JSON object.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightherd.text import TextProcessor
from tests.fakes import _LETTERS, CHECKPOINT, PROVENANCE, byte_text
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, Output, RequestHandle
from worker.engine.runner import Choices
from worker.engine.scheduler import Scheduler, StepPlan
from worker.engine.sequence import Sequence as EngineSequence

CONTEXT = 4096
_BLOCK, _BLOCKS = 16, 2048


@dataclass(frozen=True, slots=True)
class Options:
    """What the worker serves, how fast, and what goes wrong."""

    checkpoint: str = CHECKPOINT
    only_job: str | None = None
    ledger: str | None = None
    """The file to which every process appends what it computed; see `Ledger`."""
    step_seconds: float = 0.0
    first_step_seconds: float = 0.0
    """As a step that compiles."""
    load_seconds: float = 0.0
    max_sequences: int = 64
    blocks: int = _BLOCKS
    trace: bool = False
    """Steps go into the ledger too."""

    die_on: str | None = None
    """A step with a prompt that begins so kills the process."""
    hang_on: str | None = None
    """A step with a prompt that begins so never ends."""
    fail_on: str | None = None
    """A step with a prompt that begins so fails, as long as the file `fail_while` is there."""
    fail_while: str | None = None
    memory_rows: int | None = None
    """A step of more rows is out of memory."""
    step_limit: float | None = None
    """Instead of the 60 s after which an engine counts as hung."""

    at: str | None = None
    """`module:Class.method`: before its body runs, the process sends `signal` to itself."""
    nth: int = 1
    """At that call of `at`."""
    armed_by: str | None = None
    """Calls of `at` count only once this `module:Class.method` has returned."""
    signal: str = "SIGKILL"

    restore_seconds: float | None = None
    """How often Redis' unacknowledged wake-ups are looked at, instead of every 30 s."""
    retry_seconds: float | None = None
    """The pause between Celery's attempts to connect, instead of up to 30 s."""
    publish_times: int = 1
    """Each wake-up is published so often."""
    lost_wakeups: int = 0
    """So many wake-ups are lost first."""


class Ledger:
    """A file to which many processes append: what was computed, by whom and when.

    A line is `KIND VALUE PID MONOTONIC`. One short write to a file that is opened for appending
    is never torn, and what was written stays when its process is killed.
    """

    def __init__(self, path: str | None) -> None:
        self._file = (
            None
            if path is None
            else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )

    def add(self, kind: str, value: object) -> None:
        if self._file is not None:
            os.write(self._file, f"{kind} {value} {os.getpid()} {time.monotonic():.3f}\n".encode())


def next_letter(tokens: Sequence[int], seed: int) -> int:
    """The next token: a letter, by a hash of the seed and the tokens before it."""
    data = array("H", tokens).tobytes()
    digest = hashlib.blake2b(data, digest_size=2, key=seed.to_bytes(8, "big")).digest()
    return _LETTERS[int.from_bytes(digest, "big") % 26]


def text_of(prompt: str, *, seed: int, max_tokens: int) -> str:
    """What a sample's stored text must be."""
    text = _text()
    tokens = text.encode(prompt, False)
    start = len(tokens)
    for _ in range(max_tokens):
        tokens.append(next_letter(tokens, seed))
    return text.decode(tokens[start:])


def _text() -> TextProcessor:
    if not _texts:
        _texts.append(byte_text(CONTEXT))
    return _texts[0]


_texts: list[TextProcessor] = []


class LetterRunner:
    """`ModelRunner` without weights."""

    name = "letters"
    block_size = _BLOCK

    def __init__(self, options: Options, ledger: Ledger) -> None:
        self.num_blocks = options.blocks
        self.vocab_size = _text().vocab_size
        self._options = options
        self._ledger = ledger
        self._first = True

    def execute(self, plan: StepPlan) -> Choices:
        options = self._options
        sequences = [span.sequence for span in plan.spans]
        if options.trace:
            self._ledger.add("step", len(sequences))
        self._inject_faults(plan, sequences)
        time.sleep(options.first_step_seconds if self._first else options.step_seconds)
        self._first = False
        chosen = [
            next_letter(sequence.token_ids, sequence.request.seeds[sequence.index])
            for sequence, span in zip(sequences, plan.spans, strict=True)
            if span.chooses
        ]
        return Choices(chosen, [0.0] * len(chosen))

    def _inject_faults(self, plan: StepPlan, sequences: Sequence[EngineSequence]) -> None:
        options = self._options
        if _has_prompt(sequences, options.die_on):
            self._ledger.add("death", 0)
            os.kill(os.getpid(), signal.SIGKILL)
        if _has_prompt(sequences, options.hang_on):
            self._ledger.add("hang", 0)
            threading.Event().wait()
        if options.memory_rows is not None and plan.rows > options.memory_rows:
            raise MemoryError(f"{plan.rows} rows")
        failing = options.fail_while is not None and Path(options.fail_while).exists()
        if failing and _has_prompt(sequences, options.fail_on):
            raise RuntimeError("this prompt fails")

    def forget(self, sequence: EngineSequence) -> None:
        pass

    def lost(self) -> bool:
        return False

    def close(self) -> None:
        pass


def _has_prompt(sequences: Sequence[EngineSequence], prompt: str | None) -> bool:
    if prompt is None:
        return False
    start = tuple(_text().encode(prompt, False))
    return any(sequence.request.prompt_token_ids[: len(start)] == start for sequence in sequences)


class LedgerEngine(BatchEngine):
    """The real engine; each sample that it finishes goes into the ledger before all else."""

    def __init__(self, options: Options, ledger: Ledger) -> None:
        runner = LetterRunner(options, ledger)
        blocks = BlockManager(runner.num_blocks, runner.block_size)
        scheduler = Scheduler(blocks, max_sequences=options.max_sequences, budget=256)
        super().__init__(runner, scheduler, CONTEXT)
        self._ledger = ledger

    def add(self, request: EngineRequest) -> RequestHandle:
        handle = super().add(request)
        for future, seed in zip(handle.futures, request.seeds, strict=True):
            future.add_done_callback(
                lambda done, seed=seed: self._note(seed, done.result())  # type: ignore[misc]
            )
        return handle

    def _note(self, seed: int, output: Output) -> None:
        if output.finish_reason in ("stop", "length"):
            self._ledger.add("sample", seed)


# Faults in the product's own functions.


def _owner(target: str) -> tuple[Any, str]:
    """The object that holds the attribute of `module:Class.method`, and its name."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner, name = _owner(target)
    setattr(owner, name, make(getattr(owner, name)))


def _inject(options: Options, ledger: Ledger) -> None:
    """Changes what the options ask for, before any of it is used."""
    if options.at is not None:
        _inject_signal(options.at, options, ledger)
        if options.signal == "SIGSTOP":
            _replace("models.database:Database._begin", _one_writer)
    if options.step_limit is not None:
        import worker.process.hang_detector as hang_detector

        hang_detector._SHORTEST_STEP_LIMIT = options.step_limit
        hang_detector._STEP_LIMIT_FACTOR = 0.0
    if options.restore_seconds is not None:
        _replace("worker.process.consumer:make_app", _restoring(options.restore_seconds))
    if options.retry_seconds is not None:
        _replace("kombu.connection:retry_over_time", _retrying(options.retry_seconds, ledger))
    if options.publish_times != 1 or options.lost_wakeups:
        _replace("celery:Celery.send_task", _publishing(options, ledger))
    _replace("worker.chunks.task:ChunkRunner.wake", _noting(ledger))


_writing = threading.RLock()
"""Held while writing, so that a process is never stopped while it holds SQLite's lock."""


def _one_writer(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def begin(self: Any, *, reading: bool) -> Iterator[Any]:
        with nullcontext() if reading else _writing, original(self, reading=reading) as connection:
            yield connection

    return begin


def _inject_signal(target: str, options: Options, ledger: Ledger) -> None:
    armed = threading.Event()
    calls = 0
    lock = threading.Lock()

    def shoot(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **given: Any) -> Any:
            nonlocal calls
            if armed.is_set():
                with lock:
                    calls += 1
                    mine = calls == options.nth
                if mine:
                    ledger.add("signal", options.signal)
                    with _writing:
                        # To this thread: one to the process may be another's to take, and this one
                        # would go on, into a transaction, until all have stopped.
                        signal.pthread_kill(threading.get_ident(), signal.Signals[options.signal])
            return original(*args, **given)

        return replacement

    def arm(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **given: Any) -> Any:
            try:
                return original(*args, **given)
            finally:
                armed.set()

        return replacement

    _replace(target, shoot)
    if options.armed_by is None:
        armed.set()
    else:
        _replace(options.armed_by, arm)


def _restoring(seconds: float) -> Callable[..., Any]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_app(*args: Any, **given: Any) -> Any:
            app = original(*args, **given)
            app.conf.broker_transport_options["unacked_restore_interval"] = seconds
            return app

        return make_app

    return wrap


def _retrying(seconds: float, ledger: Ledger) -> Callable[..., Any]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def retry(
            fun: Any, catch: Any, args: Any, kwargs: Any, errback: Any, *rest: Any, **given: Any
        ) -> Any:
            def on_error(*told: Any) -> float:
                errback(*told)
                ledger.add("retry", told[2])
                return seconds

            return original(fun, catch, args, kwargs, on_error, *rest, **given)

        return retry

    return wrap


def _publishing(options: Options, ledger: Ledger) -> Callable[..., Any]:
    left = options.lost_wakeups

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def send(*args: Any, **given: Any) -> Any:
            nonlocal left
            if left:
                left -= 1
                ledger.add("lost", left)
                return None
            for _ in range(options.publish_times - 1):
                original(*args, **given)
            return original(*args, **given)

        return send

    return wrap


def _noting(ledger: Ledger) -> Callable[..., Any]:
    def wrap(original: Callable[..., str]) -> Callable[..., str]:
        def wake(self: Any) -> str:
            outcome = original(self)
            ledger.add("wake", outcome.replace(" ", "-"))
            return outcome

        return wake

    return wrap


def main() -> None:
    from nightherd.cli import _fail
    from nightherd.errors import NightherdError
    from nightherd.log import configure_logging
    from nightherd.settings import load_settings
    from worker.process.app import Loaded, WorkerOptions, serve

    options = Options(**(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
    ledger = Ledger(options.ledger)
    settings = load_settings()
    configure_logging(settings.log_level)
    _inject(options, ledger)

    def load(_options: WorkerOptions, _settings: object) -> Loaded:
        time.sleep(options.load_seconds)
        return Loaded(_text(), LedgerEngine(options, ledger), dict(PROVENANCE))

    try:
        serve(
            WorkerOptions(checkpoint_key=options.checkpoint, only_job=options.only_job),
            settings,
            load=load,
        )
    except NightherdError as error:
        _fail(error)
        os._exit(error.exit_code)
    # As the command does.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
