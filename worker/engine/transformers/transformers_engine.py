"""The reference engine: transformers' `generate` on static, left-padded batches.

Simple, slow and correct: the engine that the others are compared with, and the one for models that
they do not support. A batch is taken from the waiting samples, best priority first, and runs until
its last sample has ended; the future of each is resolved when it ends. One thread owns the model.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nightherd.errors import RowError, RowErrorCode
from nightherd.params import SamplingParams
from worker.engine.interface import (
    EngineRequest,
    EngineStats,
    Output,
    PositionLogprobs,
    RequestHandle,
)
from worker.engine.transformers.batch_logits import BatchLogits, BatchRow
from worker.engine.validation import one_line, out_of_memory, validate_request

logger = logging.getLogger("nightherd.engine")

GATHER_SECONDS = 0.02
"""How long an idle engine waits for more requests after the first: they arrive one by one, and a
batch that has begun takes no more."""
_RECENT_STEPS = 256

_Config: Any = GenerationConfig  # transformers leaves its constructor untyped


class _RowStops(StoppingCriteria):
    """Gives the engine each row's new token, and tells `generate` which rows have ended."""

    def __init__(
        self, engine: TransformersEngine, rows: Sequence[BatchRow], logits: BatchLogits
    ) -> None:
        self._engine = engine
        self._rows = rows
        self._logits = logits

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """`[rows]`, true where the row has ended; `input_ids` ends with the new tokens."""
        tokens = input_ids[:, -1].tolist()
        logprobs = self._logits.take_logprobs(tokens)
        for index, row in enumerate(self._rows):
            if not row.done:
                self._engine._take_token(
                    row, tokens[index], self._logits.best[index], logprobs.get(index)
                )
        self._engine._end_step()
        done = [row.done for row in self._rows]
        return cast(torch.BoolTensor, torch.tensor(done, device=input_ids.device))


class TransformersEngine:
    """`worker.engine.interface.Engine` on a transformers model, which it owns from now on.

    The model's own generation_config is replaced by an empty one: what `generate` would read from
    it (temperature, penalties, lengths) is set by each request.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        max_batch: int,
        pad_token_id: int,
        context_length: int,
    ) -> None:
        """`vocab_size` is the tokenizer's: the model's may be padded beyond, and such ids are
        never chosen. `max_batch` counts samples. `pad_token_id` may be any id: padding is
        masked, and an id that the model lacks is taken for 0."""
        self._model: Any = model
        self._model.generation_config = _Config()
        # It would warn where padding and output together are longer than the context, which harms
        # nothing: no row's own positions are.
        logging.getLogger("transformers.generation.stopping_criteria").setLevel(logging.ERROR)
        self._device: torch.device = self._model.device
        embedding = cast(torch.Tensor, model.get_input_embeddings().weight)
        rows = int(embedding.shape[0])
        self._vocab_size = min(vocab_size, rows)
        self._max_batch = max_batch
        self._pad_token_id = pad_token_id if 0 <= pad_token_id < rows else 0
        self._context_length = context_length

        self.broken: str | None = None
        """Why nothing can run any more (the device is lost); then every request is `aborted`."""
        self._wake = threading.Condition()
        self._waiting: list[tuple[int, int, BatchRow]] = []
        self._order = itertools.count()
        self._running: Sequence[BatchRow] = ()
        self._stopping = False
        self._thread: threading.Thread | None = None

        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._step_started: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    # From any thread.

    def start(self) -> None:
        """Starts the thread that owns the model."""
        if self._thread is not None:
            raise RuntimeError("the engine has been started already")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=False)
        self._thread.start()

    def add(self, request: EngineRequest) -> RequestHandle:
        """Accepts a request; one that cannot run gets its error at once."""
        handle = RequestHandle(request)
        rows = [BatchRow(handle, sample) for sample in range(len(handle.futures))]
        try:
            name = self.unsupported(request.params)
            if name is not None:
                raise RowError(
                    "unsupported_parameter", f"{name} is not supported by the {self.name} engine"
                )
            validate_request(request, self._vocab_size, self._context_length)
        except RowError as error:
            for row in rows:
                row.fail(error.code, error.message)
            return handle
        with self._wake:
            if self._stopping or self.broken is not None:
                handle.aborted = True
                for row in rows:
                    row.abort()
                return handle
            for row in rows:
                heapq.heappush(self._waiting, (-request.priority, next(self._order), row))
            self._wake.notify()
        return handle

    def abort(self, handles: Collection[RequestHandle]) -> None:
        """Resolves unfinished futures with `aborted`; a running batch drops them after its step."""
        aborted = Output((), "aborted", finished=time.monotonic())
        for handle in handles:
            handle.aborted = True
            handle.resolve(aborted)

    def unsupported(self, params: SamplingParams) -> str | None:
        """The name of a parameter that asks for structured output, if one is set."""
        if params.structured_outputs is not None:
            return "structured_outputs"
        # {"type": "text"} is no structure.
        if params.response_format is not None and params.response_format.get("type") != "text":
            return "response_format"
        return None

    def stats(self) -> EngineStats:
        """Counters, and the current load; an attempt that failed has counted its tokens too."""
        with self._wake:
            waiting = sum(not row.done for _, _, row in self._waiting)
        return EngineStats(
            steps=self._steps,
            running=sum(not row.done for row in self._running),
            waiting=waiting,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            step_started=self._step_started,
            longest_recent_step=max(tuple(self._recent), default=0.0),
        )

    def stop(self, timeout: float | None = None) -> None:
        """Aborts everything and waits for the thread, which ends after the current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._abort_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # In the engine's thread.

    def _loop(self) -> None:
        while True:
            rows = self._next_batch()
            if rows is None:
                break
            try:
                self._run(rows)
            except Exception as error:
                # A bug in the engine outside of `generate`: other batches may still work.
                logger.exception("the engine failed outside of a step")
                for row in rows:
                    row.fail("engine_error", one_line(error))
            finally:
                # Rows are left only when told to stop, or when the device is lost.
                for row in rows:
                    row.abort()
                self._running = ()
                self._step_started = None
        self._abort_all()

    def _next_batch(self) -> list[BatchRow] | None:
        """Waits for work; the samples of the next batch, None when told to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._waiting)
            self._wake.wait_for(
                lambda: self._stopping or len(self._waiting) >= self._max_batch, GATHER_SECONDS
            )
            if self._stopping:
                return None
            rows: list[BatchRow] = []
            while self._waiting and len(rows) < self._max_batch:
                row = heapq.heappop(self._waiting)[2]
                if not row.done:
                    rows.append(row)
            self._running = rows
            if rows:
                self._step_started = time.monotonic()
            return rows

    def _run(self, rows: Sequence[BatchRow], attempt: int = 0) -> None:
        """Runs a batch until all its futures are resolved.

        If it fails it is tried again in halves, then one by one: only a sample that fails alone
        gets the error.
        """
        rows = [row for row in rows if not row.done]
        if not rows or self._stopping:
            return
        failure = self._generate(rows)
        if failure is None:
            return
        left = [row for row in rows if not row.done]
        if self._device_lost():
            self.broken = failure[1]
            logger.error("the device is lost: %s", failure[1])
            self._abort_all()
        elif len(rows) == 1:
            for row in left:
                row.fail(*failure)
        else:
            size = (len(rows) + 1) // 2 if attempt == 0 else 1
            logger.warning(
                "a batch of %d failed (%s); trying again by %d", len(rows), failure[1], size
            )
            for start in range(0, len(left), size):
                self._run(left[start : start + size], attempt + 1)

    def _generate(self, rows: list[BatchRow]) -> tuple[RowErrorCode, str] | None:
        """One call of transformers' `generate`; `(code, message)` if it failed."""
        rows = [row for row in rows if self._prepare(row)]
        if not rows:
            return None
        try:
            width = max(len(row.request.prompt_token_ids) for row in rows)
            ids, mask = self._pad(rows, width)
            logits = BatchLogits(rows, width, self._vocab_size, self._device)
            with torch.inference_mode():
                self._model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=_Config(
                        do_sample=False,  # BatchLogits adds the noise: the argmax is the sample
                        max_new_tokens=max(row.request.max_new_tokens for row in rows),
                        pad_token_id=self._pad_token_id,
                        use_cache=True,
                    ),
                    logits_processor=LogitsProcessorList([logits]),
                    stopping_criteria=StoppingCriteriaList([_RowStops(self, rows, logits)]),
                )
            if all(row.done for row in rows):
                return None
            return "engine_error", "generate ended before its samples"
        except Exception as error:  # whatever model, kernels and driver raise
            code: RowErrorCode = "out_of_memory" if out_of_memory(error) else "engine_error"
            failure = code, one_line(error)
        # The traceback that held the batch's tensors is gone by now.
        if failure[0] == "out_of_memory":
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return failure

    def _prepare(self, row: BatchRow) -> bool:
        try:
            row.restart()
        except Exception as error:  # the caller's factory of stop checks
            row.fail("engine_error", one_line(error))
            return False
        row.started = row.started or time.monotonic()
        self._prompt_tokens += len(row.request.prompt_token_ids)
        return True

    def _pad(self, rows: Sequence[BatchRow], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, `[rows, width]`; prompts end at the right edge."""
        ids = torch.full((len(rows), width), self._pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            prompt = row.request.prompt_token_ids
            ids[index, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
            mask[index, width - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _take_token(
        self, row: BatchRow, token: int, best: float, logprobs: PositionLogprobs | None
    ) -> None:
        """Adds a row's new token, and resolves the row's future if that ends it.

        `best` is the greatest of the processed logits that it was chosen from.
        """
        request = row.request
        if best == -math.inf:
            row.fail("invalid_request", "the parameters leave no token to choose")
            return
        if not math.isfinite(best):
            row.fail("engine_error", "the model's logits are not finite")
            return
        self._completion_tokens += 1
        if token in request.eos_token_ids:
            row.finish("stop")
            return
        if token in request.stop_token_ids:
            row.finish("stop", stop_reason=token)
            return
        row.tokens.append(token)
        if logprobs is not None:
            row.logprobs.append(logprobs)
        try:
            stopped = row.stop_check is not None and row.stop_check(token)
        except Exception as error:  # the caller's stop check
            row.fail("engine_error", one_line(error))
            return
        if stopped:
            row.finish("stop")
        elif len(row.tokens) >= request.max_new_tokens:
            row.finish("length")

    def _end_step(self) -> None:
        now = time.monotonic()
        self._steps += 1
        if self._step_started is not None:
            self._recent.append(now - self._step_started)
        self._step_started = now

    def _device_lost(self) -> bool:
        """Whether a CUDA error has made the context unusable for good."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except Exception:
            return True
        return False

    def _abort_all(self) -> None:
        with self._wake:
            rows = [row for _, _, row in self._waiting]
            self._waiting.clear()
        for row in (*rows, *self._running):
            row.abort()
