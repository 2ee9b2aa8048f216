"""The engine: one thread that plans steps, runs them and resolves futures. No torch.

A step mixes decoding and prefilling sequences (see `docs/engine.md`). Where a step fails, only the
requests that make it fail get an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

from nightherd.errors import RowError, RowErrorCode
from nightherd.params import SamplingParams
from worker.engine.interface import EngineRequest, EngineStats, Output, RequestHandle
from worker.engine.runner import AsyncRunner, Choices, ModelRunner, PendingStep
from worker.engine.sample import Sample
from worker.engine.scheduler import Scheduler, StepPlan
from worker.engine.validation import one_line, out_of_memory, validate_request

logger = logging.getLogger("nightherd.engine")

_RECENT_STEPS = 256
_OOM_RECOVERY_STEPS = 1000
"""After so many steps without running out of memory, the limit of rows a step is doubled."""


@dataclass(frozen=True, slots=True)
class _StartedStep:
    """A step that was started, until its choices are processed."""

    samples: list[Sample]
    choosing: list[Sample]
    """Those of them whose next token it chooses."""
    pending: PendingStep


class BatchEngine:
    """`worker.engine.interface.Engine` on a `ModelRunner`, which it owns from now on."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, context_length: int) -> None:
        self.name = runner.name
        self.broken: str | None = None
        self._runner = runner
        self.scheduler = scheduler
        self._context_length = context_length
        self._wake = threading.Condition()
        self._inbox: deque[Sample] = deque()
        self._aborted: deque[RequestHandle] = deque()
        self._samples: dict[int, list[Sample]] = {}
        """The unfinished samples of each handle, by its `id`; for the engine's thread only."""
        self._async_runner = runner if isinstance(runner, AsyncRunner) else None
        self._pending_steps: deque[_StartedStep] = deque()
        """At most one between steps, and none unless the runner is an `AsyncRunner`."""
        self._planned: list[Sample] = []
        self._planned_rows = 0
        self._steps_since_oom: int | None = None
        """None while steps have their full size."""
        self._order = 0
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
        try:
            validate_request(request, self._runner.vocab_size, self._context_length)
        except RowError as error:
            handle.resolve(Output((), "error", error_code=error.code, error_message=error.message))
            return handle
        with self._wake:
            if self._stopping or self.broken is not None:
                handle.aborted = True
                handle.resolve(Output((), "aborted"))
                return handle
            for index in range(len(handle.futures)):
                self._inbox.append(Sample(handle, index, self._order))
                self._order += 1
            self._wake.notify()
        return handle

    def abort(self, handles: Collection[RequestHandle]) -> None:
        """Resolves unfinished futures with `aborted`; their blocks are free a step later."""
        aborted = Output((), "aborted", finished=time.monotonic())
        for handle in handles:
            handle.aborted = True
            handle.resolve(aborted)
        with self._wake:
            self._aborted.extend(handles)
            self._wake.notify()

    def unsupported(self, params: SamplingParams) -> str | None:
        """None: this engine supports all parameters."""
        return None

    def stats(self) -> EngineStats:
        """Counters, and the current load."""
        with self._wake:
            waiting = len(self._inbox)
        return EngineStats(
            steps=self._steps,
            running=len(self.scheduler.running),
            waiting=waiting + self.scheduler.waiting,
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
        for samples in list(self._samples.values()):
            for sample in samples:
                sample.abort()
        with self._wake:
            waiting = list(self._inbox)
        for sample in waiting:
            sample.abort()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # In the engine's thread.

    def _loop(self) -> None:
        while self._process_inbox():
            try:
                self._step_or_recover()
            except Exception as error:
                # A bug in the engine itself: the scheduler's state cannot be trusted any more.
                logger.exception("the engine failed outside of a step")
                self._break(one_line(error))
            if self.broken is not None:
                break
        self._step_started = None
        self._abort_all()
        self._runner.close()

    def _process_inbox(self) -> bool:
        """Waits for work, queues new samples and releases aborted ones; False if told to stop."""
        with self._wake:
            if self.scheduler.idle and not self._inbox and not self._stopping:
                self._step_started = None
                self._wake.wait_for(lambda: self._stopping or self._inbox or self._aborted)
            if self._stopping:
                return False
            new = list(self._inbox)
            self._inbox.clear()
            aborted = list(self._aborted)
            self._aborted.clear()
        for sample in new:
            if not sample.done:
                self._samples.setdefault(id(sample.handle), []).append(sample)
                self.scheduler.add(sample)
        for handle in aborted:
            self._release(self._samples.get(id(handle), ()))
        return True

    def _step_or_recover(self) -> None:
        if self.scheduler.idle:
            return
        self._step_started = time.monotonic()
        try:
            self._step(overlap=True)
        except Exception as error:  # whatever model, kernels and driver raise
            self._recover(error)

    def _step(self, *, overlap: bool = False) -> None:
        """Plans a step, computes it and processes the chosen tokens.

        With `overlap` the step may still be pending on return: then the tokens processed are those
        of the step before. Raises what the runner raises.
        """
        plan = self.scheduler.plan()
        if not plan.spans:
            if self._pending_steps:
                self._process_choices(max_pending=0)
            else:
                self._fail_first_waiting()
            return
        now = time.monotonic()
        samples = [cast(Sample, span.sequence) for span in plan.spans]
        self._planned, self._planned_rows = samples, plan.rows
        for sample in samples:
            if not sample.started:
                sample.started = now
                self._prompt_tokens += sample.prompt_length
                self._begin(sample)
        self._start_step(plan, samples)
        runner = self._async_runner
        overlaps = overlap and runner is not None and self._all_support_overlap(runner)
        self._process_choices(max_pending=1 if overlaps else 0)

    def _start_step(self, plan: StepPlan, samples: list[Sample]) -> None:
        choosing = [
            sample for span, sample in zip(plan.spans, samples, strict=True) if span.chooses
        ]
        if self._async_runner is not None:
            pending = self._async_runner.launch(plan)
        else:
            choices = self._runner.execute(plan)

            def pending() -> Choices:
                return choices

        self.scheduler.advance(plan)
        for sample in choosing:
            sample.num_unresolved += 1
        self._pending_steps.append(_StartedStep(samples, choosing, pending))

    def _all_support_overlap(self, runner: AsyncRunner) -> bool:
        return all(runner.supports_overlap(sequence) for sequence in self.scheduler.running)

    def _process_choices(self, *, max_pending: int) -> None:
        """Processes the tokens of started steps, oldest first, until `max_pending` are pending.

        A pending step may include a sample that ended in the step before it: the token chosen for
        it is dropped, and the blocks that it wrote to are overwritten by their next owner.
        """
        while len(self._pending_steps) > max_pending:
            step = self._pending_steps[0]
            choices = step.pending()
            self._pending_steps.popleft()
            ended: list[Sample] = []
            self._completion_tokens += len(step.choosing)
            if self._async_runner is not None:
                self._completion_tokens -= sum(sample.done for sample in step.choosing)
            for index, sample in enumerate(step.choosing):
                sample.num_unresolved -= 1
                token, best = choices.token_ids[index], choices.best[index]
                aborted = sample.done
                if sample.take_token(token, best, choices.logprobs.get(index)):
                    ended.append(sample)
                    if not aborted:
                        self.scheduler.record_length(sample)
            if ended:
                self._release(ended)
            self._end_step()

    def _drop_pending_steps(self) -> list[Sample]:
        """Drops pending steps after a failure; returns the samples that were in them."""
        samples = [sample for step in self._pending_steps for sample in step.samples]
        for step in self._pending_steps:
            for sample in step.choosing:
                sample.num_unresolved = 0
        self._pending_steps.clear()
        return samples

    def _begin(self, sample: Sample) -> None:
        try:
            sample.begin()
        except Exception as error:  # the caller's factories
            sample.fail("engine_error", one_line(error))

    def _release(self, samples: Iterable[Sample]) -> None:
        """Frees what finished samples hold: blocks, the runner's state, their entry here."""
        samples = list(samples)
        self.scheduler.remove(samples)
        for sample in samples:
            self._runner.forget(sample)
            siblings = self._samples.get(id(sample.handle))
            if siblings is not None and sample in siblings:
                siblings.remove(sample)
                if not siblings:
                    del self._samples[id(sample.handle)]

    def _fail_first_waiting(self) -> None:
        """Fails the first waiting sample, for which even the empty KV cache is too small."""
        sample = cast("Sample | None", self.scheduler.first_waiting())
        if sample is None:
            return
        room = self._runner.num_blocks * self._runner.block_size
        sample.fail(
            "out_of_memory",
            f"{sample.length} tokens do not fit into the KV cache of {room} tokens; give the "
            "worker more with --kv-memory",
        )
        self._release([sample])

    def _end_step(self) -> None:
        now = time.monotonic()
        self._steps += 1
        if self._step_started is not None:
            self._recent.append(now - self._step_started)
        self._step_started = now
        if self._steps_since_oom is not None:
            self._steps_since_oom += 1
            if self._steps_since_oom >= _OOM_RECOVERY_STEPS:
                self.scheduler.limit(2 * self.scheduler.budget)
                self._steps_since_oom = 0 if self.scheduler.limited else None

    # When a step fails.

    def _recover(self, error: Exception) -> None:
        """Finds the samples that make a step fail: retries in two halves, then one by one.

        The others keep what they have generated; their keys and values are computed again. If the
        step ran out of memory and no sample fails alone, steps stay as small as those that worked.
        """
        involved = dict.fromkeys([*self._drop_pending_steps(), *self._planned])
        retried = [sample for sample in involved if not sample.done]
        rows, full = self._planned_rows, self.scheduler.budget
        if self._device_lost():
            self._break(one_line(error))
            return
        logger.warning(
            "a step of %d sequences failed (%s); trying again by half",
            len(retried),
            one_line(error),
        )
        self.scheduler.start_over()
        queued = cast("list[Sample]", self.scheduler.drain())
        oom, any_failed, fits = out_of_memory(error), False, (rows + 1) // 2
        middle = (len(retried) + 1) // 2
        for half in (retried[:middle], retried[middle:]):
            if self.broken is not None or not half:
                continue
            if oom:
                self.scheduler.limit((rows + 1) // 2)
            if self._retry_isolated(half) is not None:
                if oom:
                    self.scheduler.limit(rows // 4)
                any_failed = self._retry_one_by_one(half) or any_failed
            fits = min(fits, self.scheduler.budget)
        if oom:
            self.scheduler.limit(full if any_failed else fits)
            self._steps_since_oom = 0 if self.scheduler.limited else None
            logger.warning("out of memory; from now on %d rows a step", self.scheduler.budget)
        ended = [sample for sample in queued if sample.done]
        for sample in queued:
            if not sample.done:
                self.scheduler.add(sample)
        self._release(ended)

    def _retry_one_by_one(self, samples: Iterable[Sample]) -> bool:
        """Fails the samples that fail alone; returns whether there were any."""
        any_failed = False
        for sample in samples:
            before = self.scheduler.budget
            failure = None if self.broken else self._retry_isolated([sample])
            while failure is not None and out_of_memory(failure) and self.scheduler.budget > 1:
                # A long prompt may fit in smaller pieces.
                self.scheduler.limit(self.scheduler.budget // 2)
                failure = None if self.broken else self._retry_isolated([sample])
            if failure is not None:
                any_failed = True
                self.scheduler.limit(before)
                code: RowErrorCode = "out_of_memory" if out_of_memory(failure) else "engine_error"
                sample.fail(code, one_line(failure))
        return any_failed

    def _retry_isolated(self, group: list[Sample]) -> Exception | None:
        """Runs a group, and no other sample, until each has a new token; returns what it raised."""
        for sample in group:
            if not sample.done:
                self.scheduler.add(sample)
        before = {id(sample): sample.length for sample in group}
        failure: Exception | None = None
        try:
            while not self._stopping and any(
                not sample.done and sample.length == before[id(sample)] for sample in group
            ):
                self._step()
        except Exception as error:
            failure = error
            self._drop_pending_steps()
            if self._device_lost():
                self._break(one_line(error))
        self.scheduler.start_over()
        self.scheduler.drain()
        return failure

    def _device_lost(self) -> bool:
        try:
            return self._runner.lost()
        except Exception:
            return True

    def _break(self, reason: str) -> None:
        logger.error("the engine is broken: %s", reason)
        self.broken = reason
        self._abort_all()

    def _abort_all(self) -> None:
        with self._wake:
            samples = list(self._inbox)
            self._inbox.clear()
        for siblings in list(self._samples.values()):
            samples += siblings
        for sample in samples:
            sample.abort()
        self._samples.clear()
