"""Plans each step: which positions of which sequences it computes.

A step is a list of rows, one a position. Each decoding sequence has one row, and the rest of the
token budget goes to prefills, in order (chunked prefill, Sarathi: Agrawal et al. 2024). When blocks
run out the newest sequence is preempted: it keeps its tokens, and their keys and values are
computed again later. That is rare: a sequence is admitted only if the expected peak of the blocks
that all will need fits (`forecast.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.engine.block_manager import BlockManager, Match
from worker.engine.forecast import Forecast, LengthHistory
from worker.engine.sequence import Sequence

PREFILL_MIN_FREE_FRACTION = 1 / 16
"""With `separate_prefill`, a step prefills while others decode only if at least this fraction of
`max_sequences` is free; and, if the next sequence lacked blocks, only once this fraction of the
running sequences has ended since."""
_MARGIN_GROWTH, _MAX_MARGIN, _MARGIN_DECAY = 0.02, 0.3, 0.002
"""The margin is a fraction of the blocks: it grows by a plan that preempts, up to a maximum, and
decays by each sequence that ends."""


class Span:
    """Positions `[start, start + count)` of a sequence, to be computed in a step."""

    __slots__ = ("chooses", "count", "sequence", "start")

    def __init__(self, sequence: Sequence, start: int, count: int) -> None:
        self.sequence = sequence
        self.start = start
        self.count = count
        self.chooses = start + count == sequence.length
        """Whether the span reaches the sequence's end, so that the step chooses its next token."""


@dataclass(slots=True)
class StepPlan:
    """The spans that one step computes."""

    spans: list[Span] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(span.count for span in self.spans)


class Scheduler:
    """Admits, preempts and plans. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_sequences: int,
        budget: int,
        separate_prefill: bool = False,
    ) -> None:
        """`separate_prefill`: no step both prefills and decodes, so that decode steps have few
        shapes."""
        if budget < max_sequences:
            raise ValueError(
                f"the token budget ({budget}) must be at least max_sequences ({max_sequences}): "
                "each running sequence needs a row in each step"
            )
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.budget = budget
        """Rows of a step, at most."""
        self.running: list[Sequence] = []
        """In the order of admission."""
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self.preemptions = 0
        self._full_limits = (max_sequences, budget)
        self._separate_prefill = separate_prefill
        self._prefilling = False
        self.length_history = LengthHistory()
        self._max_blocks = 0
        """What all running sequences need if each gets as long as it may; shared blocks count for
        each."""
        self._margin = 0.0
        """The fraction of the blocks that is kept free because forecasts were too low before."""
        self._ended = 0
        """Sequences that ran and were removed, since the start."""
        self._last_refused: tuple[Sequence, int] | None = None
        """The sequence that last lacked blocks for admission, and `_ended` at that time."""

    @property
    def limited(self) -> bool:
        """Whether `limit` has made steps smaller."""
        return self.budget < self._full_limits[1]

    def limit(self, rows: int) -> None:
        """Sets the budget of rows a step, up to the one given at the start."""
        sequences, budget = self._full_limits
        self.budget = max(1, min(rows, budget))
        self.max_sequences = min(sequences, self.budget)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that was preempted comes before those that arrived later."""
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Removes sequences, waiting or running, and frees their blocks."""
        gone = set(map(id, sequences))
        left = []
        for sequence in self.running:
            if id(sequence) in gone:
                self._free(sequence)
                self._ended += 1
                self._margin *= 1 - _MARGIN_DECAY
            else:
                left.append(sequence)
        self.running = left
        waiting = [entry for entry in self._waiting if id(entry[1]) not in gone]
        if len(waiting) != len(self._waiting):
            heapq.heapify(waiting)
            self._waiting = waiting

    def record_length(self, sequence: Sequence) -> None:
        """Records the output length of a sequence that has ended, for forecasts. `remove` must
        follow."""
        self.length_history.record(sequence)

    def plan(self) -> StepPlan:
        """The next step; empty if nothing can run: then the first waiting sequence is too large."""
        preempted = self.preemptions
        plan = self._plan()
        if self.preemptions != preempted:
            self._margin = min(_MAX_MARGIN, self._margin + _MARGIN_GROWTH)
        return plan

    def _plan(self) -> StepPlan:
        plan = StepPlan()
        preempted = self.preemptions
        running = [sequence for sequence in self.running if not sequence.exhausted]
        if self._separate_prefill:
            prefilling = [sequence for sequence in running if sequence.pending > 1]
            if prefilling or self._prefilling or self._admission_pays():
                budget = self._schedule_running(plan, prefilling)
                if self.preemptions == preempted:
                    self._admit(plan, budget)
                # Once sequences are being admitted, steps prefill until no more can be.
                self._prefilling = bool(plan.spans)
                if plan.spans:
                    return plan
            self._schedule_running(
                plan, [sequence for sequence in running if sequence.pending == 1]
            )
            return plan
        budget = self._schedule_running(plan, running)
        if self.preemptions == preempted:
            self._admit(plan, budget)
        return plan

    def _schedule_running(self, plan: StepPlan, sequences: list[Sequence]) -> int:
        """Adds running sequences to the plan; returns what is left of the budget."""
        budget = self.budget
        preempted = self.preemptions
        for sequence in sequences:
            if budget == 0:
                break
            if self.preemptions != preempted and sequence not in self.running:
                continue  # preempted by this loop
            count = min(sequence.pending, budget)
            if self._allocate_or_preempt(sequence, sequence.computed + count):
                budget -= count
                self._add_span(plan, sequence, count)
        return budget

    def _admission_pays(self) -> bool:
        """Whether a step that only prefills pays, see `PREFILL_MIN_FREE_FRACTION`: many small
        prefills cost more than few large ones."""
        if not self._waiting:
            return False
        if not self.running:
            return True
        free = self.max_sequences - len(self.running)
        return (
            free >= self.max_sequences * PREFILL_MIN_FREE_FRACTION
            and not self._waits_for_blocks(len(self.running) * PREFILL_MIN_FREE_FRACTION)
        )

    def _waits_for_blocks(self, enough: float) -> bool:
        """Whether the next sequence lacked blocks when it was last tried, and fewer than `enough`
        running sequences have ended since: then it is not worth trying again."""
        if self._last_refused is None or not self._waiting:
            return False
        sequence, ended = self._last_refused
        return sequence is self._waiting[0][1] and self._ended - ended < enough

    def _add_span(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        plan.spans.append(Span(sequence, sequence.computed, count))
        end = sequence.computed + count
        known = min(end, sequence.num_known_tokens)
        if known // self.blocks.block_size > len(sequence.prefix_ids):
            self.blocks.cache_full_blocks(sequence, known)

    def _allocate_or_preempt(self, sequence: Sequence, length: int) -> bool:
        """Allocates blocks for `[0, length)` of a running sequence, and preempts the newest ones if
        too few are free. False if the sequence itself was preempted."""
        if length <= len(sequence.block_ids) * self.blocks.block_size:
            return True
        while not self.blocks.extend(sequence, length):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self._max_blocks -= self._max_blocks_of(sequence)

    def _free_all(self) -> None:
        for sequence in self.running:
            self._free(sequence)
        self._last_refused = None

    def _max_blocks_of(self, sequence: Sequence) -> int:
        """What a sequence needs if it gets as long as it may; its last token is never computed."""
        return self.blocks.blocks_for(sequence.prompt_length + sequence.request.max_new_tokens - 1)

    def _admit(self, plan: StepPlan, budget: int) -> None:
        if not self._separate_prefill and self._waits_for_blocks(min(1, len(self.running))):
            return
        forecast: Forecast | None = None
        while budget > 0 and self._waiting and len(self.running) < self.max_sequences:
            sequence = self._waiting[0][1]
            match = self.blocks.match(sequence)
            fits = self.blocks.fits(sequence.length, match)
            if fits and self.running and not self._fits_worst_case(sequence, match):
                if forecast is None:
                    forecast = self._forecast(sequence)
                limit = self.blocks.num_blocks * (1 - self._margin)
                fits = forecast.admit(sequence, len(match.blocks), match.idle, limit)
            if not fits:
                self._last_refused = (sequence, self._ended)
                return
            heapq.heappop(self._waiting)
            self.blocks.admit(sequence, match)
            count = min(sequence.pending, budget)
            if not self.blocks.extend(sequence, sequence.computed + count):
                raise AssertionError(f"{sequence} was found to fit, and gets no blocks")
            self.running.append(sequence)
            self._max_blocks += self._max_blocks_of(sequence)
            budget -= count
            self._add_span(plan, sequence, count)

    def _fits_worst_case(self, sequence: Sequence, match: Match) -> bool:
        """Whether all sequences fit, this one included, even if each gets as long as it may."""
        growth = self._max_blocks - self.blocks.held
        needed = self._max_blocks_of(sequence) - len(match.blocks) + match.idle
        return self.blocks.used + growth + needed <= self.blocks.num_blocks

    def _forecast(self, sequence: Sequence) -> Forecast:
        return Forecast(
            self.running,
            [self.blocks.num_shared(each) for each in self.running],
            sequence,
            used=self.blocks.used,
            block_size=self.blocks.block_size,
            history=self.length_history,
        )

    def first_waiting(self) -> Sequence | None:
        return self._waiting[0][1] if self._waiting else None

    def advance(self, plan: StepPlan) -> None:
        """Counts the plan's positions as computed."""
        for span in plan.spans:
            span.sequence.computed += span.count

    def start_over(self) -> None:
        """Queues all sequences to be computed again, as a failed step has spoilt the KV cache."""
        self._free_all()
        for sequence in self.running:
            self.add(sequence)
        self.running = []
        self.blocks.clear_cache()

    def drain(self) -> list[Sequence]:
        """Removes and returns all sequences, by rank; running ones lose what they have computed."""
        self._free_all()
        removed = [*self.running, *(sequence for _, sequence in self._waiting)]
        self.running, self._waiting = [], []
        return sorted(removed, key=lambda sequence: sequence.rank)

    def check(self) -> None:
        """`BlockManager.check`, and the scheduler's own invariants between steps. For tests."""
        self.blocks.check(self.running)
        most = sum(map(self._max_blocks_of, self.running))
        if most != self._max_blocks:
            raise AssertionError(f"{self._max_blocks} blocks counted at most, {most} needed")
        for sequence in self.running:
            room = len(sequence.block_ids) * self.blocks.block_size
            if not 0 <= sequence.computed <= min(room, sequence.length):
                raise AssertionError(f"{sequence} has room for {room}")
        for _, sequence in self._waiting:
            if sequence.block_ids or sequence.computed:
                raise AssertionError(f"{sequence} waits and holds blocks")
