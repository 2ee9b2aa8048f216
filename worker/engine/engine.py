"""The engine: one thread that plans, computes and answers, step by step. No torch.

A step mixes decoding and prefilling sequences (see `docs/engine.md`). Whatever goes wrong in a step
costs the requests that make it go wrong, and nobody else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import cast

from nightherd.params import SamplingParams
from worker.engine.interface import EngineRequest, EngineStats, Generation, Output, answer
from worker.engine.requests import one_line, out_of_memory, problem_of
from worker.engine.runner import AheadRunner, Choices, Flight, ModelRunner
from worker.engine.sample import Sample
from worker.engine.scheduler import Plan, Scheduler

logger = logging.getLogger("nightherd.engine")

_RECENT_STEPS = 256
_CALM_STEPS = 1000
"""After so many steps without a lack of memory they may be twice as large again."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was started, until its choices are taken in."""

    samples: list[Sample]
    choosing: list[Sample]
    flight: Flight


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
        self._aborted: deque[Generation] = deque()
        self._samples: dict[int, list[Sample]] = {}
        """The samples of each generation, by its identity: the engine's thread's alone."""
        self._ahead = runner if isinstance(runner, AheadRunner) else None
        self._under_way: deque[_Step] = deque()
        """At most one between steps, and none unless the runner is one that runs ahead."""
        self._planned: list[Sample] = []
        self._planned_rows = 0
        self._calm: int | None = None
        """Steps since memory was lacking; None while steps have their full size."""
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

    def add(self, request: EngineRequest) -> Generation:
        """Accepts a request; one that cannot run is answered at once, with the reason."""
        generation = Generation(request)
        for future in generation.futures:
            # From here on nobody can cancel it: abort is the way.
            future.set_running_or_notify_cancel()
        problem = problem_of(request, self._runner.vocab_size, self._context_length)
        if problem is not None:
            for future in generation.futures:
                answer(future, Output((), "error", error_code=problem[0], error_message=problem[1]))
            return generation
        with self._wake:
            if self._stopping or self.broken is not None:
                generation.aborted = True
                for future in generation.futures:
                    answer(future, Output((), "aborted"))
                return generation
            for place in range(len(generation.futures)):
                self._inbox.append(Sample(generation, place, self._order))
                self._order += 1
            self._wake.notify()
        return generation

    def abort(self, generations: Many[Generation]) -> None:
        """Answers what is not yet done with `aborted`; its blocks are free a step later."""
        aborted = Output((), "aborted", finished=time.monotonic())
        for generation in generations:
            generation.aborted = True
            for future in generation.futures:
                answer(future, aborted)
        with self._wake:
            self._aborted.extend(generations)
            self._wake.notify()

    def unsupported(self, params: SamplingParams) -> str | None:
        """None: all parameters are honoured."""
        return None

    def stats(self) -> EngineStats:
        """Counters and what is going on now."""
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
        """Aborts everything and waits for the thread, which ends after the step under way."""
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
        while self._take_in():
            try:
                self._advance()
            except Exception as error:
                # A mistake of ours outside of a step: the plan cannot be trusted any more.
                logger.exception("the engine failed outside of a step")
                self._break(one_line(error))
            if self.broken is not None:
                break
        self._step_started = None
        self._abort_all()
        self._runner.close()

    def _take_in(self) -> bool:
        """Waits for work, takes in what is new and lets go what is aborted; False: to stop."""
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
                self._samples.setdefault(id(sample.generation), []).append(sample)
                self.scheduler.add(sample)
        for generation in aborted:
            self._let_go(self._samples.get(id(generation), ()))
        return True

    def _advance(self) -> None:
        if self.scheduler.idle:
            return
        self._step_started = time.monotonic()
        try:
            self._step(ahead=True)
        except Exception as error:  # whatever model, kernels and driver raise
            self._recover(error)

    def _step(self, *, ahead: bool = False) -> None:
        """Plans a step, computes it and takes in the chosen tokens.

        With `ahead` the step may still be under way at the end, and the tokens taken in are those
        of the step before. Raises what the runner raises.
        """
        plan = self.scheduler.plan()
        if not plan.spans:
            if self._under_way:
                self._take_choices(0)
            else:
                self._refuse_the_first()
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
        waits = ahead and self._ahead is not None and self._all_run_ahead(self._ahead)
        self._take_choices(1 if waits else 0)

    def _start_step(self, plan: Plan, samples: list[Sample]) -> None:
        choosing = [
            sample for span, sample in zip(plan.spans, samples, strict=True) if span.chooses
        ]
        if self._ahead is not None:
            flight = self._ahead.launch(plan)
        else:
            choices = self._runner.execute(plan)

            def flight() -> Choices:
                return choices

        self.scheduler.advance(plan)
        for sample in choosing:
            sample.ahead += 1
        self._under_way.append(_Step(samples, choosing, flight))

    def _all_run_ahead(self, runner: AheadRunner) -> bool:
        return all(runner.runs_ahead(sequence) for sequence in self.scheduler.running)

    def _take_choices(self, left: int) -> None:
        """Takes in what steps have chosen, the oldest first, until `left` are under way.

        A sample that ended in the step before may be in a step all the same: what that chose for it
        is dropped, and what it wrote lies in blocks whose next owner writes after it.
        """
        while len(self._under_way) > left:
            step = self._under_way[0]
            choices = step.flight()
            self._under_way.popleft()
            ended: list[Sample] = []
            self._completion_tokens += len(step.choosing)
            if self._ahead is not None:
                self._completion_tokens -= sum(sample.done for sample in step.choosing)
            for place, sample in enumerate(step.choosing):
                sample.ahead -= 1
                token, best = choices.token_ids[place], choices.best[place]
                aborted = sample.done
                if sample.take(token, best, choices.logprobs.get(place)):
                    ended.append(sample)
                    if not aborted:
                        self.scheduler.ended(sample)
            if ended:
                self._let_go(ended)
            self._end_step()

    def _forget_steps(self) -> list[Sample]:
        """Gives up what is under way after a failure; who was in it."""
        samples = [sample for step in self._under_way for sample in step.samples]
        for step in self._under_way:
            for sample in step.choosing:
                sample.ahead = 0
        self._under_way.clear()
        return samples

    def _begin(self, sample: Sample) -> None:
        try:
            sample.begin()
        except Exception as error:  # the caller's factories
            sample.fail("engine_error", one_line(error))

    def _let_go(self, samples: Many[Sample]) -> None:
        samples = list(samples)
        self.scheduler.remove(samples)
        for sample in samples:
            self._runner.forget(sample)
            siblings = self._samples.get(id(sample.generation))
            if siblings is not None and sample in siblings:
                siblings.remove(sample)
                if not siblings:
                    del self._samples[id(sample.generation)]

    def _refuse_the_first(self) -> None:
        """Nothing runs and yet the first one waiting has no room: it never will."""
        sample = cast("Sample | None", self.scheduler.first_waiting())
        if sample is None:
            return
        room = self._runner.num_blocks * self._runner.block_size
        sample.fail(
            "out_of_memory",
            f"{sample.length} tokens do not fit into the KV cache of {room} tokens; give the "
            "worker more with --kv-memory",
        )
        self._let_go([sample])

    def _end_step(self) -> None:
        now = time.monotonic()
        self._steps += 1
        if self._step_started is not None:
            self._recent.append(now - self._step_started)
        self._step_started = now
        if self._calm is not None:
            self._calm += 1
            if self._calm >= _CALM_STEPS:
                self.scheduler.limit(2 * self.scheduler.budget)
                self._calm = 0 if self.scheduler.limited else None

    # When a step fails.

    def _recover(self, error: Exception) -> None:
        """Finds out who makes a step fail: again in two halves, then one by one.

        All others keep what they have generated; their keys and values are computed again. Where
        memory was lacking and nobody alone is to blame, steps stay as small as those that went
        well.
        """
        involved = dict.fromkeys([*self._forget_steps(), *self._planned])
        suspects = [sample for sample in involved if not sample.done]
        rows, full = self._planned_rows, self.scheduler.budget
        if self._lost():
            self._break(one_line(error))
            return
        logger.warning(
            "a step of %d sequences failed (%s); trying again by half",
            len(suspects),
            one_line(error),
        )
        self.scheduler.start_over()
        parked = cast("list[Sample]", self.scheduler.drain())
        lacking, blamed, fits = out_of_memory(error), False, (rows + 1) // 2
        middle = (len(suspects) + 1) // 2
        for half in (suspects[:middle], suspects[middle:]):
            if self.broken is not None or not half:
                continue
            if lacking:
                self.scheduler.limit((rows + 1) // 2)
            if self._survives(half) is not None:
                if lacking:
                    self.scheduler.limit(rows // 4)
                blamed = self._one_by_one(half) or blamed
            fits = min(fits, self.scheduler.budget)
        if lacking:
            self.scheduler.limit(full if blamed else fits)
            self._calm = 0 if self.scheduler.limited else None
            logger.warning("out of memory; from now on %d rows a step", self.scheduler.budget)
        ended = [sample for sample in parked if sample.done]
        for sample in parked:
            if not sample.done:
                self.scheduler.add(sample)
        self._let_go(ended)

    def _one_by_one(self, samples: Many[Sample]) -> bool:
        """Fails those that fail alone; whether there were any."""
        blamed = False
        for sample in samples:
            before = self.scheduler.budget
            failure = None if self.broken else self._survives([sample])
            while failure is not None and out_of_memory(failure) and self.scheduler.budget > 1:
                # A long prompt may fit in smaller pieces.
                self.scheduler.limit(self.scheduler.budget // 2)
                failure = None if self.broken else self._survives([sample])
            if failure is not None:
                blamed = True
                self.scheduler.limit(before)
                code = "out_of_memory" if out_of_memory(failure) else "engine_error"
                sample.fail(code, one_line(failure))
        return blamed

    def _survives(self, group: Many[Sample]) -> Exception | None:
        """Lets a group choose one token each, with nobody else; returns what went wrong."""
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
            self._forget_steps()
            if self._lost():
                self._break(one_line(error))
        self.scheduler.start_over()
        self.scheduler.drain()
        return failure

    def _lost(self) -> bool:
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
