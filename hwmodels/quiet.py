"""Times from a machine that others use too: only what was measured while the machine was as fast as it can be counts.

On a shared machine a core's speed changes by half for seconds at a time (a neighbour on the same core, another clock),
and no number of repetitions within such a time tells. So every sample is taken between two of a reference, and the
reference tells which samples were quiet; what is not quiet enough is measured again later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .measurement import median_interval

# The reference may be this much slower than it has ever been: more than its own jitter, less than a neighbour costs.
SLACK = 0.12
# Shares of that slack which are tried first.
_CALMER = (1 / 3, 2 / 3)
# Quiet samples that settle a time.
ENOUGH = 12
# Fewer of a process say little of how fast that process is.
_OF_PROCESS = 3
# A process takes up to so many times as many samples as are wanted, until so many of them are quiet: starting another
# one takes longer than a few more samples.
_PATIENCE = 4
# Of what differs from process to process up to so many times as many samples count.
_DISAGREEING = 3


@dataclass(frozen=True)
class Samples:
    """Seconds of runs, and what the reference took beside each.

    `processes` says how many runs are of each process, one process after the other; by default all are of one.
    """

    run_s: tuple[float, ...] = ()
    reference_s: tuple[float, ...] = ()
    processes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.run_s) != len(self.reference_s):
            raise ValueError(
                f"{len(self.run_s)} runs have {len(self.reference_s)} times of the reference; give one each"
            )
        if not self.processes and self.run_s:
            object.__setattr__(self, "processes", (len(self.run_s),))
        if sum(self.processes) != len(self.run_s):
            raise ValueError(f"{len(self.run_s)} runs are not those of processes with {self.processes} runs")

    def __add__(self, other: Samples) -> Samples:
        return Samples(self.run_s + other.run_s, self.reference_s + other.reference_s, self.processes + other.processes)


@dataclass(frozen=True)
class Settled:
    """A time on a quiet machine: the median, its 95 % interval, the samples behind it, and whether they were quiet.

    The interval reaches to the median of every process, as `Measurement.ci95` does.
    """

    median_s: float
    low_s: float
    high_s: float
    runs: int
    quiet: bool


def best_reference_s(samples: Sequence[Samples]) -> float:
    """What the reference takes on a quiet machine: the fastest twentieth of all its times."""
    times = [seconds for sample in samples for seconds in sample.reference_s]
    if not times:
        raise ValueError("no sample has a time of the reference")
    return float(np.quantile(times, 0.05))


def steadily_slower(samples: Sequence[Samples], known_s: float, slack: float = SLACK) -> float | None:
    """How many times as long as known the reference took, where it was slower throughout and yet steady; else None.

    A neighbour comes and goes. A machine with a lower clock, on battery or under a limit of power, stays as it is.
    """
    times = [seconds for sample in samples for seconds in sample.reference_s]
    if not times:
        return None
    fast, usual = (float(value) for value in np.quantile(times, (0.05, 0.5)))
    return fast / known_s if fast > (1 + slack) * known_s and usual <= (1 + slack) * fast else None


def settled(samples: Samples, best_s: float, slack: float = SLACK, enough: int = ENOUGH) -> Settled:
    """The time that samples give.

    Quiet samples count as they are: dividing by the reference then only adds how its memory happened to lie in each
    process (measured: some 3 %). Of others the ratio is taken, as if the reference had taken `best_s`.

    Args:
        samples: At least one.
        best_s: What the reference takes on a quiet machine.
        slack: How much longer, relatively, it may take beside a sample that counts as quiet.
        enough: With fewer quiet samples all are used, and the result is not `quiet`. A neighbour slows different code
            down differently, so that their ratios to the reference may be some 10 % off.
    """
    if not samples.run_s:
        raise ValueError("no sample was given; at least one is needed")
    calm = quiet_samples(samples, best_s, slack)
    quiet = len(calm.run_s) >= enough
    # What waits for memory a neighbour slows down by more than the reference: where the calmest are enough, they count.
    calmer = (quiet_samples(samples, best_s, share * slack) for share in _CALMER)
    calm = next((those for those in calmer if len(those.run_s) >= enough), calm)
    scaled = np.array(calm.run_s) if quiet else np.array(samples.run_s) / np.array(samples.reference_s) * best_s
    parts = _by_process(scaled, calm if quiet else samples)
    medians = [float(np.median(part)) for part in parts if len(part) >= _OF_PROCESS]
    low, high = median_interval([float(value) for value in scaled])
    return Settled(float(np.median(scaled)), min([low, *medians]), max([high, *medians]), len(scaled), quiet)


def quiet_limit_s(best_s: float | None, slack: float = SLACK) -> float:
    """What the reference may take beside a sample that counts as quiet; 0 where its best is not known."""
    return 0.0 if best_s is None else (1 + slack) * best_s


def lacking(reference_s: Sequence[float], runs: int, quiet_s: float) -> bool:
    """Whether a process takes one more sample of something: too few were taken, or too few of them were quiet.

    Args:
        reference_s: What the reference took beside those that it has.
        runs: How many are wanted.
        quiet_s: What the reference may take beside a quiet one; 0 where that is not known, then any count.
    """
    taken = len(reference_s)
    return taken < runs or (taken < _PATIENCE * runs and sum(s <= quiet_s for s in reference_s) < runs and quiet_s > 0)


def open_samples(
    samples: Samples | None, best_s: float | None, slack: float = SLACK, enough: int = ENOUGH, exact: float = 0.0
) -> bool:
    """Whether more samples are needed: there are none, or too few quiet ones.

    Args:
        samples: So far.
        best_s: What the reference takes on a quiet machine.
        slack: As in `settled`.
        enough: Quiet samples that settle a time.
        exact: Where it is not 0 and processes disagree, so that the standard error of their median is relatively more
            than this, up to three times as many samples are.
    """
    if samples is None or best_s is None:
        return True
    quiet = quiet_samples(samples, best_s, slack)
    if len(quiet.run_s) < enough:
        return True
    return bool(exact) and len(quiet.run_s) < _DISAGREEING * enough and standard_error(quiet) > exact


def quiet_samples(samples: Samples, best_s: float, slack: float = SLACK) -> Samples:
    """Those beside which the reference took at most so much longer than at its best."""
    of_process = np.repeat(np.arange(len(samples.processes)), samples.processes)
    calm = np.array(samples.reference_s) <= (1 + slack) * best_s
    kept = [
        (run, beside) for run, beside, is_calm in zip(samples.run_s, samples.reference_s, calm, strict=True) if is_calm
    ]
    counts = [int((calm & (of_process == one)).sum()) for one in range(len(samples.processes))]
    runs, references = zip(*kept, strict=True) if kept else ((), ())
    return Samples(tuple(runs), tuple(references), tuple(count for count in counts if count))


def standard_error(samples: Samples) -> float:
    """The relative standard error of the median of the processes' medians; infinite where there is one process.

    That of a mean times 1.2533, the root of pi / 2: as if processes were normally distributed.
    """
    medians = [float(np.median(part)) for part in _by_process(np.array(samples.run_s), samples)]
    if len(medians) < 2:
        return math.inf
    return math.sqrt(math.pi / 2 / len(medians)) * float(np.std(medians, ddof=1) / np.median(medians))


def _by_process(values: NDArray[np.float64], samples: Samples) -> list[NDArray[np.float64]]:
    """One value for every sample, those of each process together."""
    return np.split(values, np.cumsum(samples.processes)[:-1])
