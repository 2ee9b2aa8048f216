"""A forecast of the blocks that the running sequences will need. numpy, no torch.

The model decides when an output ends, so its length is not known before. The lengths of the same
job's earlier outputs, and of those that still run, give the probability that an output reaches some
length (the estimate of Kaplan and Meier 1958), and from that follow the expected blocks at each
later step, if no more sequences are admitted. The scheduler admits as long as the peak fits (as the
past-future scheduler of Gong et al. 2025 does with sampled lengths).
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from worker.engine.sequence import Sequence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNIT = 16
"""Tokens: the resolution of lengths."""
LONG = 1024
"""Tokens. The prior, while nothing is known of a job: all outputs get this long, and of those that
are longer half end within each 0.7 * LONG tokens. A limit of 100,000 tokens is rarely meant."""
_PRIOR_WEIGHT = 0.5
"""How many sequences the prior counts for, once some lengths are known."""
_MAX_COUNTED = 512
"""About how many ended outputs of a job count; older ones fade out."""
_MAX_JOBS = 64
_NUM_TIMES = 24
"""Later steps that are forecast, at growing distances."""
_NUM_ENDS = 40
"""And of those at which a sequence reaches its limit: the peaks are just before these."""
_DEVIATIONS = 2.0
"""The forecast is the expected need and so many standard deviations."""


class JobLengths:
    """The distribution of the lengths of one job's outputs, in units."""

    def __init__(self) -> None:
        self._stopped = np.zeros(64)
        self._cut = np.zeros(64)
        self._count = 0
        self._survival: Floats = np.ones(1)

    def add(self, generated: int, *, stopped: bool) -> None:
        """Counts an output that has ended: by itself, or cut at its limit (a censored length)."""
        unit = generated // UNIT
        if unit >= len(self._stopped):
            longer = max(unit + 1, 2 * len(self._stopped))
            self._stopped.resize(longer, refcheck=False)
            self._cut.resize(longer, refcheck=False)
        (self._stopped if stopped else self._cut)[unit] += 1
        self._count += 1
        if self._count >= _MAX_COUNTED:
            self._stopped /= 2
            self._cut /= 2
            self._count //= 2

    def update(self, running: Ints) -> None:
        """Makes the estimate anew, with the lengths so far of the outputs that run now."""
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
        hazard = (stopped + _PRIOR_WEIGHT * late * UNIT / LONG) / (reached + _PRIOR_WEIGHT)
        self._survival = np.concatenate([np.ones(1), (1 - hazard).cumprod()])

    def survival(self, lengths: Ints) -> Floats:
        """The probability that an output reaches each of these lengths, in tokens."""
        last = len(self._survival) - 1
        chance: Floats = self._survival[np.minimum(lengths // UNIT, last)]
        known = max(last * UNIT, LONG)
        if lengths.size and lengths.max() > known:
            chance = chance * np.exp(-np.maximum(lengths - known, 0) / LONG)
        return chance


def _last(counts: Floats) -> int:
    found = np.flatnonzero(counts)
    return int(found[-1]) if len(found) else 0


class LengthHistory:
    """The lengths of each job's outputs, for the jobs used last."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, JobLengths] = OrderedDict()

    def of(self, job: str) -> JobLengths:
        found = self._jobs.get(job)
        if found is None:
            found = self._jobs[job] = JobLengths()
            if len(self._jobs) > _MAX_JOBS:
                self._jobs.popitem(last=False)
        self._jobs.move_to_end(job)
        return found

    def record(self, sequence: Sequence) -> None:
        """Counts the output of a sequence that has ended."""
        generated = sequence.generated
        stopped = generated < sequence.request.max_new_tokens
        self.of(sequence.request.job).add(generated, stopped=stopped)


class Forecast:
    """The blocks that sequences will hold if no more are admitted."""

    def __init__(
        self,
        running: list[Sequence],
        num_shared: list[int],
        candidate: Sequence,
        *,
        used: int,
        block_size: int,
        history: LengthHistory,
    ) -> None:
        """`num_shared`: for each running sequence, how many of its blocks others hold too; `used`:
        blocks in use now; `candidate`: the next sequence to be admitted."""
        self._history, self._block_size = history, block_size
        remaining = np.array([_remaining(sequence) for sequence in [*running, candidate]])
        self._times = _times(remaining)
        self._mean = np.zeros(len(self._times))
        self._variance = np.zeros(len(self._times))
        own = sum(len(sequence.block_ids) for sequence in running) - sum(num_shared)
        self._mean += used - own
        jobs: dict[str, list[int]] = {candidate.request.job: []}
        for index, sequence in enumerate(running):
            jobs.setdefault(sequence.request.job, []).append(index)
        for job, indices in jobs.items():
            some = [running[index] for index in indices]
            ages = np.array([sequence.generated for sequence in some], np.int64)
            history.of(job).update(ages)
            if some:
                shared = [num_shared[index] for index in indices]
                mean, variance = self._needs(job, some, shared, ages)
                self._mean += mean.sum(0)
                self._variance += variance.sum(0)

    def admit(self, sequence: Sequence, cached: int, idle: int, limit: float) -> bool:
        """Whether the peak stays within `limit` blocks with another sequence; if so, it is added.

        `cached` of its blocks are in the prefix cache, and `idle` of these are held by no sequence.
        """
        ages = np.array([sequence.generated])
        mean, variance = self._needs(sequence.request.job, [sequence], [cached], ages)
        mean, variance = self._mean + mean[0] + idle, self._variance + variance[0]
        if (mean + _DEVIATIONS * np.sqrt(variance)).max() > limit:
            return False
        self._mean, self._variance = mean, variance
        return True

    def _needs(
        self, job: str, sequences: list[Sequence], num_shared: list[int], ages: Ints
    ) -> tuple[Floats, Floats]:
        """Unshared blocks of each sequence at each time: mean and variance, [sequences, times]."""
        lengths = np.array([sequence.length for sequence in sequences])
        remaining = np.array([_remaining(sequence) for sequence in sequences])
        times = self._times
        job_lengths = self._history.of(job)
        chance = job_lengths.survival(ages[:, None] + times) / job_lengths.survival(ages)[:, None]
        chance[times >= remaining[:, None]] = 0
        blocks = -(-(lengths[:, None] + times) // self._block_size) - np.array(num_shared)[:, None]
        mean = chance * blocks
        return mean, mean * blocks * (1 - chance)


def _remaining(sequence: Sequence) -> int:
    """Tokens that it may still generate."""
    return max(1, sequence.request.max_new_tokens - sequence.generated)


def _times(remaining: Ints) -> Ints:
    """The steps from now for which the need is forecast."""
    ends = np.unique(remaining - 1)
    if len(ends) > _NUM_ENDS:
        ends = ends[np.linspace(0, len(ends) - 1, _NUM_ENDS).astype(np.int64)]
    growing = np.geomspace(1, max(2, int(remaining.max())), _NUM_TIMES).astype(np.int64)
    return np.unique(np.concatenate([np.zeros(1, np.int64), growing, ends]))
