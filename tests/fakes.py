"""Fast stand-ins, so that a whole worker runs on any machine in a second.

`FakeEngine` is the engine's interface without a model: its output is a pure function of the prompt,
the seed and `max_new_tokens`, so that whatever happens to a worker, `expected_text` says what must
stand in the database at the end. `byte_text` is the real text side over a tokenizer of bytes.

`python -m tests.fakes OPTIONS` serves with it, as `nightherd worker` does, in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nightherd.errors import RowErrorCode
from nightherd.params import SamplingParams, sample_seed
from nightherd.text import TextProcessor
from worker.engine.interface import EngineRequest, EngineStats, Output, RequestHandle

_SPECIAL = ("<|begin|>", "<|end|>")
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_LETTERS = [len(_SPECIAL) + _ALPHABET.index(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]

CHECKPOINT = "fakes/bytes@main"

PROVENANCE: dict[str, Any] = {
    "id": "0" * 32,
    "checkpoint_key": CHECKPOINT,
    "revision": "main",
    "weights_hash": None,
    "tokenizer_hash": "1" * 32,
    "template_hash": None,
    "dtype": "float32",
    "device": "fake",
    "engine": "fake",
    "versions": {},
}


def byte_text(context_length: int = 256) -> TextProcessor:
    """The real text side: a token a byte, no token added, made in memory."""
    vocab = {token: number for number, token in enumerate((*_SPECIAL, *_ALPHABET))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return TextProcessor(
        tokenizer,
        special_tokens={"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]},
        chat_template=None,
        config={"max_position_embeddings": context_length},
        generation_config={},
        tokenizer_hash=str(PROVENANCE["tokenizer_hash"]),
    )


def fake_tokens(prompt: Sequence[int], seed: int, count: int) -> tuple[int, ...]:
    """The tokens of one sample: letters, by a hash of all that may matter."""
    source = f"{tuple(prompt)}:{seed}:{count}".encode()
    digest = hashlib.blake2b(source, digest_size=min(count, 64)).digest()
    return tuple(_LETTERS[digest[index % 64] % 26] for index in range(count))


def expected_text(prompt: str, *, job_seed: int, index: int, sample: int, max_tokens: int) -> str:
    """What a sample's stored text must be."""
    text = byte_text()
    seed = sample_seed(job_seed, None, index, sample)
    return text.decode(fake_tokens(text.encode(prompt, False), seed, max_tokens))


@dataclass(eq=False, slots=True)
class _Sequence:
    """A sample that runs: its tokens are known, they only have to come out."""

    handle: RequestHandle
    index: int
    """Which sample of its request."""
    started: float = 0.0
    emitted: int = 0
    check: Any = None
    tokens: tuple[int, ...] = field(default=())


Failure = tuple[RowErrorCode, str]
"""Code and message of a row that fails."""


class FakeEngine:
    """One token a step for all samples at once, a step every `step_seconds`; faults on demand."""

    name = "fake"

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.broken: str | None = None
        self.step_seconds = step_seconds
        self.fails: Callable[[EngineRequest], Failure | None] = lambda request: None
        """`(code, message)` of a request that is to fail."""
        self.raises: Callable[[EngineRequest], Exception | None] = lambda request: None
        """What `add` is to raise for a request."""
        self.finishes: Callable[[Output], Output] = lambda output: output
        """Applied to each output at its end."""
        self.refuses: str | None = None
        """The parameter that `unsupported` names."""
        self.added = 0
        self.most_running = 0
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._wake = threading.Condition()
        self._sequences: list[_Sequence] = []
        self._stopping = False
        self._steps = self._prompt_tokens = self._completion_tokens = 0
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # Faults.

    def hang(self) -> None:
        """The next step does not end until `go_on`."""
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    def break_down(self, reason: str = "the device is lost") -> None:
        """Nothing runs any more."""
        self.broken = reason
        self._abort_all()

    # The interface.

    def start(self) -> None:
        self._thread.start()

    def add(self, request: EngineRequest) -> RequestHandle:
        error = self.raises(request)
        if error is not None:
            raise error
        handle = RequestHandle(request)
        self.added += 1
        failure = self.fails(request)
        if failure is not None:
            code, message = failure
            for future in handle.futures:
                future.set_result(Output((), "error", error_code=code, error_message=message))
            return handle
        sequences = [_Sequence(handle, index) for index in range(len(request.seeds))]
        with self._wake:
            if not self._stopping and self.broken is None:
                self._sequences += sequences
                self._wake.notify()
                return handle
        self.abort([handle])
        return handle

    def abort(self, handles: Sequence[RequestHandle]) -> None:
        with self._wake:
            for handle in handles:
                handle.aborted = True
            aborted = set(map(id, handles))
            self._sequences = [s for s in self._sequences if id(s.handle) not in aborted]
        for handle in handles:
            for future in handle.futures:
                _answer(future, Output((), "aborted"))

    def unsupported(self, params: SamplingParams) -> str | None:
        return self.refuses

    def stats(self) -> EngineStats:
        return EngineStats(
            steps=self._steps,
            running=len(self._sequences),
            waiting=0,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            step_started=self._step_started,
            longest_recent_step=self.step_seconds,
        )

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._abort_all()
        self._thread.join()

    # The engine's thread.

    def _abort_all(self) -> None:
        with self._wake:
            handles = [sequence.handle for sequence in self._sequences]
        self.abort(handles)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._sequences)
                if self._stopping:
                    return
                running = list(self._sequences)
            self._step_started = time.monotonic()
            self.most_running = max(self.most_running, len(running))
            self._goes_on.wait()
            if self.step_seconds:
                time.sleep(self.step_seconds)
            ended = [sequence for sequence in running if self._advance(sequence)]
            with self._wake:
                self._sequences = [s for s in self._sequences if s not in ended]
                self._step_started = None if not self._sequences else self._step_started
            self._steps += 1

    def _advance(self, sequence: _Sequence) -> bool:
        """The next token; true if it was the last. Without a pace all of them come at once."""
        request = sequence.handle.request
        if not sequence.emitted:
            sequence.started = time.monotonic()
            sequence.tokens = fake_tokens(
                request.prompt_token_ids, request.seeds[sequence.index], request.max_new_tokens
            )
            if request.make_stop_check is not None:
                sequence.check = request.make_stop_check()
            self._prompt_tokens += len(request.prompt_token_ids)
        count = 1 if self.step_seconds else len(sequence.tokens)
        for token in sequence.tokens[sequence.emitted : sequence.emitted + count]:
            sequence.emitted += 1
            self._completion_tokens += 1
            stopped = sequence.check is not None and sequence.check(token)
            if stopped or sequence.emitted == len(sequence.tokens):
                output = Output(
                    sequence.tokens[: sequence.emitted],
                    "stop" if stopped else "length",
                    started=sequence.started,
                    finished=time.monotonic(),
                )
                _answer(sequence.handle.futures[sequence.index], self.finishes(output))
                return True
        return False


_answering = threading.Lock()


def _answer(future: Any, output: Output) -> None:
    """The first answer counts."""
    with _answering:
        if future.done():
            return
    # Outside of the lock: callbacks run in here. Only a test that aborts in the very instant of
    # the last token could come between.
    try:
        future.set_result(output)
    except Exception:  # noqa: S110 - it was answered in that instant
        pass


def main() -> None:
    """Serves with a fake engine; options come as one JSON object.

    `checkpoint`, `only_job`, `context_length`, `step_seconds`, `load_seconds`, `load_error`;
    `blocked_load_seconds`: the same, while the main thread gets no
    signal; `hang_on_stop`: the engine does
    not stop; `break_on`: a prompt that begins so breaks the engine.
    """
    from nightherd.cli import _fail
    from nightherd.errors import CheckpointError, NightherdError
    from nightherd.log import configure_logging
    from nightherd.settings import load_settings
    from worker.process.app import Loaded, WorkerOptions, serve

    given: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    settings = load_settings()
    configure_logging(settings.log_level)

    def load(options: WorkerOptions, _settings: object) -> Loaded:
        if "load_error" in given:
            raise CheckpointError(given["load_error"])
        if "blocked_load_seconds" in given:
            # As a library's call that no signal ends: others of the process get it.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            print("loading", file=sys.stderr, flush=True)
            time.sleep(given["blocked_load_seconds"])
        time.sleep(given.get("load_seconds", 0.0))
        engine = FakeEngine(given.get("step_seconds", 0.0))
        text = byte_text(given.get("context_length", 4096))
        if "break_on" in given:
            start = tuple(text.encode(given["break_on"], False))

            def fails(request: EngineRequest) -> Failure | None:
                if request.prompt_token_ids[: len(start)] == start:
                    threading.Timer(0.2, engine.break_down).start()
                return None

            engine.fails = fails
        if given.get("hang_on_stop"):
            # As an engine in the middle of a long step: a thread that the process waits for.
            engine.stop = lambda: time.sleep(3600)  # type: ignore[method-assign]
            threading.Thread(target=time.sleep, args=(3600,)).start()
        return Loaded(text, engine, dict(PROVENANCE))

    options = WorkerOptions(
        checkpoint_key=given.get("checkpoint", CHECKPOINT), only_job=given.get("only_job")
    )
    try:
        serve(options, settings, load=load)
    except NightherdError as error:
        _fail(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
