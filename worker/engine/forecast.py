"""How many blocks the running sequences will come to need. numpy, no torch.

Outputs end when the model says so, so nobody knows how long they get. What is known is how long
those of the same job were: from these, and from those that run still, comes the chance that an
output of some length goes on (Kaplan and Meier 1958), and from that the blocks expected at each
later step, as long as nobody else is admitted. The scheduler admits as long as the peak fits (as
the past-future scheduler of Gong et al. 2025 does with drawn lengths).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Many

import numpy as np
import numpy.typing as npt

from worker.engine.sequence import Sequence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNIT = 16
"""Tokens: lengths are told apart by so many."""
LONG = 1024
"""Tokens: up to there an output is taken to reach its limit as long as nothing is known of its
job; from there on half of those that are left end within 0.7 of that. Who allows 100,000 tokens
mostly does not mean it."""
_DOUBT = 0.5
"""Sequences' worth of that, once something is known."""
_MEMORY = 512
"""Ended outputs of a job that count, about; older ones fade."""
_JOBS = 64
_TIMES = 24
"""Steps ahead that are looked at, in growing distances."""
_ENDS = 40
"""And of those at which a sequence reaches its limit: before these lie the peaks."""
_DEVIATIONS = 2.0
"""How far above what is expected the need may come to lie."""


class Lengths:
    """How long the outputs of one job were, by units."""

    def __init__(self) -> None:
        self._stopped = np.zeros(64)
        self._cut = np.zeros(64)
        self._count = 0
        self._survival: Floats = np.ones(1)

    def add(self, generated: int, *, stopped: bool) -> None:
        """An output has ended: by itself, or at its limit, which tells only how long it got."""
        unit = generated // UNIT
        if unit >= len(self._stopped):
            longer = max(unit + 1, 2 * len(self._stopped))
            self._stopped.resize(longer, refcheck=False)
            self._cut.resize(longer, refcheck=False)
        (self._stopped if stopped else self._cut)[unit] += 1
        self._count += 1
        if self._count >= _MEMORY:
            self._stopped /= 2
            self._cut /= 2
            self._count //= 2

    def learn(self, running: Ints) -> None:
        """Takes in how long those outputs are that run now."""
        units = running // UNIT
        size = 1 + max(int(units.max(initial=0)), int(_last(self._stopped)), int(_last(self._cut)))
        ended = np.zeros(size)
        for counts in (self._stopped, self._cut):
            ended[: min(size, len(counts))] += counts[:size]
        ended += np.bincount(units, minlength=size)
        reached = ended[::-1].cumsum()[::-1]
        stopped = np.zeros(size)
        stopped[: min(size, len(self._stopped))] = self._stopped[:size]
        late = np.arange(size) * UNIT >= LONG
        hazard = (stopped + _DOUBT * late * UNIT / LONG) / (reached + _DOUBT)
        self._survival = np.concatenate([np.ones(1), (1 - hazard).cumprod()])

    def reaching(self, lengths: Ints) -> Floats:
        """The chance that an output gets so long."""
        last = len(self._survival) - 1
        chance: Floats = self._survival[np.minimum(lengths // UNIT, last)]
        known = max(last * UNIT, LONG)
        if lengths.size and lengths.max() > known:
            chance = chance * np.exp(-np.maximum(lengths - known, 0) / LONG)
        return chance


def _last(counts: Floats) -> int:
    found = np.flatnonzero(counts)
    return int(found[-1]) if len(found) else 0


class Outputs:
    """The lengths of each job's outputs."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Lengths] = OrderedDict()

    def of(self, job: str) -> Lengths:
        found = self._jobs.get(job)
        if found is None:
            found = self._jobs[job] = Lengths()
            if len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)
        self._jobs.move_to_end(job)
        return found

    def ended(self, sequence: Sequence) -> None:
        """A sequence has its whole output."""
        generated = sequence.generated
        stopped = generated < sequence.request.max_new_tokens
        self.of(sequence.request.job).add(generated, stopped=stopped)


class Forecast:
    """The blocks that sequences will hold if nobody else comes."""

    def __init__(
        self,
        running: Many[Sequence],
        shared: Many[int],
        first: Sequence,
        *,
        used: int,
        block: int,
        outputs: Outputs,
    ) -> None:
        """`shared` is how many of each one's blocks others have too, `used` how many blocks are in
        use now; `first` is who may be admitted."""
        self._outputs, self._block = outputs, block
        left = np.array([_left(sequence) for sequence in [*running, first]])
        self._times = _times(left)
        self._mean = np.zeros(len(self._times))
        self._variance = np.zeros(len(self._times))
        own = sum(len(sequence.block_ids) for sequence in running) - sum(shared)
        self._mean += used - own
        jobs: dict[str, list[int]] = {first.request.job: []}
        for place, sequence in enumerate(running):
            jobs.setdefault(sequence.request.job, []).append(place)
        for job, places in jobs.items():
            some = [running[place] for place in places]
            ages = np.array([sequence.generated for sequence in some], np.int64)
            outputs.of(job).learn(ages)
            if some:
                mean, variance = self._needs(job, some, [shared[place] for place in places], ages)
                self._mean += mean.sum(0)
                self._variance += variance.sum(0)

    def admit(self, sequence: Sequence, found: int, idle: int, most: float) -> bool:
        """Whether the peak stays within `most` with another sequence, which then counts.

        It would take over `found` blocks, `idle` of which nobody has now.
        """
        ages = np.array([sequence.generated])
        mean, variance = self._needs(sequence.request.job, [sequence], [found], ages)
        mean, variance = self._mean + mean[0] + idle, self._variance + variance[0]
        if (mean + _DEVIATIONS * np.sqrt(variance)).max() > most:
            return False
        self._mean, self._variance = mean, variance
        return True

    def _needs(
        self, job: str, sequences: Many[Sequence], shared: Many[int], ages: Ints
    ) -> tuple[Floats, Floats]:
        """Blocks of its own that each sequence needs at each time, expected, and their variance."""
        lengths = np.array([sequence.length for sequence in sequences])
        left = np.array([_left(sequence) for sequence in sequences])
        times = self._times
        known = self._outputs.of(job)
        chance = known.reaching(ages[:, None] + times) / known.reaching(ages)[:, None]
        chance[times >= left[:, None]] = 0
        blocks = -(-(lengths[:, None] + times) // self._block) - np.array(shared)[:, None]
        mean = chance * blocks
        return mean, mean * blocks * (1 - chance)


def _left(sequence: Sequence) -> int:
    """Tokens that it may generate yet."""
    return max(1, sequence.request.max_new_tokens - sequence.generated)


def _times(left: Ints) -> Ints:
    """Steps ahead at which the need is looked at."""
    ends = np.unique(left - 1)
    if len(ends) > _ENDS:
        ends = ends[np.linspace(0, len(ends) - 1, _ENDS).astype(np.int64)]
    growing = np.geomspace(1, max(2, int(left.max())), _TIMES).astype(np.int64)
    return np.unique(np.concatenate([np.zeros(1, np.int64), growing, ends]))
