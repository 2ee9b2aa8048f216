"""Which positions of which sequences go into the next step.

A step is a list of rows, one a position: all sequences that decode give one each, and what is left
of the token budget goes to prefills, in order (chunked prefill, Sarathi: Agrawal et al. 2024). When
blocks run out the newest sequence is preempted: it keeps what it generated and is computed again
later. That is rare, as sequences are admitted only while the peak of what all will need is expected
to fit (`forecast.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from worker.engine.block_manager import BlockManager, Match
from worker.engine.forecast import Forecast, Outputs
from worker.engine.sequence import Sequence

_FEW = 16
_STEP, _MOST, _CALM = 0.02, 0.3, 0.002
"""The margin's growth by a plan that preempts, its most, its decay by a sequence that ends."""


class Span:
    """Positions `[start, start + count)` of a sequence, to be computed in a step."""

    __slots__ = ("chooses", "count", "sequence", "start")

    def __init__(self, sequence: Sequence, start: int, count: int) -> None:
        self.sequence = sequence
        self.start = start
        self.count = count
        self.chooses = start + count == sequence.length
        """Whether the step reaches the sequence's end, so that its next token is chosen."""


@dataclass(slots=True)
class Plan:
    """One step."""

    spans: list[Span] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(span.count for span in self.spans)


class Scheduler:
    """Admits, preempts and plans. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self, blocks: BlockManager, *, max_sequences: int, budget: int, apart: bool = False
    ) -> None:
        """`apart`: a step either prefills or decodes, so that decoding ones have few shapes."""
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
        self._most = (max_sequences, budget)
        self._apart = apart
        self._filling = False
        self.outputs = Outputs()
        self._promised = 0
        """Blocks of all that run, if each gets as long as it may."""
        self._margin = 0.0
        """Of the blocks, kept free since what was expected had proved too little."""
        self._ended = 0
        """Sequences that ran and are gone, over all time."""
        self._refused: tuple[Sequence, int] | None = None
        """Who had to wait for blocks at last, and how many had ended then."""

    @property
    def limited(self) -> bool:
        """Whether steps are smaller than they were made to be."""
        return self.budget < self._most[1]

    def limit(self, rows: int) -> None:
        """At most so many rows a step from now on, and never more than it was made with."""
        sequences, budget = self._most
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

    def remove(self, sequences: Many[Sequence]) -> None:
        """Forgets sequences, waiting or running, and frees their blocks."""
        gone = set(map(id, sequences))
        left = []
        for sequence in self.running:
            if id(sequence) in gone:
                self._stop(sequence)
                self._ended += 1
                self._margin *= 1 - _CALM
            else:
                left.append(sequence)
        self.running = left
        waiting = [entry for entry in self._waiting if id(entry[1]) not in gone]
        if len(waiting) != len(self._waiting):
            heapq.heapify(waiting)
            self._waiting = waiting

    def ended(self, sequence: Sequence) -> None:
        """A sequence has its whole output: what that tells of others'. `remove` must follow."""
        self.outputs.ended(sequence)

    def plan(self) -> Plan:
        """The next step; empty if nothing can run (then the first one waiting is too large)."""
        preempted = self.preemptions
        plan = self._plan()
        if self.preemptions != preempted:
            self._margin = min(_MOST, self._margin + _STEP)
        return plan

    def _plan(self) -> Plan:
        plan = Plan()
        preempted = self.preemptions
        running = [sequence for sequence in self.running if not sequence.exhausted]
        if self._apart:
            prefilling = [sequence for sequence in running if sequence.pending > 1]
            if prefilling or self._filling or self._admission_pays():
                budget = self._go_on(plan, prefilling)
                if self.preemptions == preempted:
                    self._admit(plan, budget)
                # Once seats are being filled, they all are.
                self._filling = bool(plan.spans)
                if plan.spans:
                    return plan
            self._go_on(plan, [sequence for sequence in running if sequence.pending == 1])
            return plan
        budget = self._go_on(plan, running)
        if self.preemptions == preempted:
            self._admit(plan, budget)
        return plan

    def _go_on(self, plan: Plan, sequences: Many[Sequence]) -> int:
        """Plans running sequences; what is left of the budget."""
        budget = self.budget
        preempted = self.preemptions
        for sequence in sequences:
            if budget == 0:
                break
            if self.preemptions != preempted and sequence not in self.running:
                continue  # preempted a moment ago
            count = min(sequence.pending, budget)
            if self._make_room(sequence, sequence.computed + count):
                budget -= count
                self._put(plan, sequence, count)
        return budget

    def _admission_pays(self) -> bool:
        """Whether a step that only prefills is worth it: while others decode, a sixteenth of the
        seats should be free, or of the sequences have ended, for many small prefills cost more than
        few large."""
        if not self._waiting:
            return False
        if not self.running:
            return True
        seats = self.max_sequences - len(self.running)
        return seats * _FEW >= self.max_sequences and not self._waits_for_blocks(_FEW)

    def _waits_for_blocks(self, share: int) -> bool:
        """Whether the next one had no room, and too few have ended since to look again: one in
        `share` of those that run."""
        if self._refused is None or not self._waiting:
            return False
        sequence, ended = self._refused
        return sequence is self._waiting[0][1] and (self._ended - ended) * share < len(self.running)

    def _put(self, plan: Plan, sequence: Sequence, count: int) -> None:
        plan.spans.append(Span(sequence, sequence.computed, count))
        end = sequence.computed + count
        known = min(end, sequence.known)
        if known // self.blocks.block_size > len(sequence.chain):
            self.blocks.publish(sequence, known)

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for a running sequence, if need be at the expense of the newest ones."""
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
        self._stop(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self._promised -= self._most_blocks(sequence)

    def _stop_all(self) -> None:
        for sequence in self.running:
            self._stop(sequence)
        self._refused = None

    def _most_blocks(self, sequence: Sequence) -> int:
        """The last token is chosen, and never computed."""
        return self.blocks.blocks_for(sequence.prompt_length + sequence.request.max_new_tokens - 1)

    def _admit(self, plan: Plan, budget: int) -> None:
        if not self._apart and self._waits_for_blocks(len(self.running)):
            return
        forecast: Forecast | None = None
        while budget > 0 and self._waiting and len(self.running) < self.max_sequences:
            sequence = self._waiting[0][1]
            match = self.blocks.match(sequence)
            fits = self.blocks.fits(sequence.length, match)
            if fits and self.running and not self._surely_fits(sequence, match):
                if forecast is None:
                    forecast = self._forecast(sequence)
                most = self.blocks.num_blocks * (1 - self._margin)
                fits = forecast.admit(sequence, len(match.blocks), match.idle, most)
            if not fits:
                self._refused = (sequence, self._ended)
                return
            heapq.heappop(self._waiting)
            self.blocks.admit(sequence, match)
            count = min(sequence.pending, budget)
            if not self.blocks.extend(sequence, sequence.computed + count):
                raise AssertionError(f"{sequence} fits and yet does not")
            self.running.append(sequence)
            self._promised += self._most_blocks(sequence)
            budget -= count
            self._put(plan, sequence, count)

    def _surely_fits(self, sequence: Sequence, match: Match) -> bool:
        """Whether all have room, however long they get: true wherever blocks are plenty."""
        growth = self._promised - self.blocks.held
        needed = self._most_blocks(sequence) - len(match.blocks) + match.idle
        return self.blocks.used + growth + needed <= self.blocks.num_blocks

    def _forecast(self, sequence: Sequence) -> Forecast:
        return Forecast(
            self.running,
            [self.blocks.shared(each) for each in self.running],
            sequence,
            used=self.blocks.used,
            block=self.blocks.block_size,
            outputs=self.outputs,
        )

    def first_waiting(self) -> Sequence | None:
        return self._waiting[0][1] if self._waiting else None

    def advance(self, plan: Plan) -> None:
        """The step is done: its positions are in the KV cache."""
        for span in plan.spans:
            span.sequence.computed += span.count

    def start_over(self) -> None:
        """The step failed: the KV cache cannot be trusted; all wait to be computed again."""
        self._stop_all()
        for sequence in self.running:
            self.add(sequence)
        self.running = []
        self.blocks.forget_all()

    def drain(self) -> list[Sequence]:
        """Takes all sequences out, best rank first; running ones lose what they have computed."""
        self._stop_all()
        taken = [*self.running, *(sequence for _, sequence in self._waiting)]
        self.running, self._waiting = [], []
        return sorted(taken, key=lambda sequence: sequence.rank)

    def check(self) -> None:
        """`BlockManager.check`, and what holds between steps. For tests."""
        self.blocks.check(self.running)
        promised = sum(map(self._most_blocks, self.running))
        if promised != self._promised:
            raise AssertionError(f"{self._promised} blocks promised, {promised} by those that run")
        for sequence in self.running:
            room = len(sequence.block_ids) * self.blocks.block_size
            if not 0 <= sequence.computed <= min(room, sequence.length):
                raise AssertionError(f"{sequence} has room for {room}")
        for _, sequence in self._waiting:
            if sequence.block_ids or sequence.computed:
                raise AssertionError(f"{sequence} waits and holds blocks")
