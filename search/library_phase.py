"""The library phase of a search: the errors of all options on the workers, then the table, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..spaces.local_error import LocalErrors
from ..spaces.space import Kind
from .library import option_table
from .library_file import library_key, read_library, write_library
from .option_table import OptionTable
from .progress import Progress
from .workers import Failure, Pool

if TYPE_CHECKING:
    from .evaluate import Evaluator, Job, Metrics

LIBRARY = "library.json"
# Parts for every worker: few, because each runs the original once; more than one, because parts differ in length.
_PARTS = 2
# What is assumed of options that nobody asked for, and of those that could not be looked at.
_UNKNOWN, _FAILED = 1e-3, 1.0


def library(
    evaluator: Evaluator, run: Path, pool: Pool, workers: int, costs: Sequence[str], progress: Progress
) -> OptionTable:
    """The run's table of options, made on the workers unless the run has it.

    Args:
        evaluator: Of the run.
        run: Its folder.
        pool: Whose workers look at the options.
        workers: Their number.
        costs: Names of objectives and budgets.
        progress: Told of every part.

    Raises:
        UserError: the run's table is damaged.
    """
    from .evaluate import Job

    space = evaluator.proposal.space
    tensors = [*evaluator.traced.module.state_dict().values(), evaluator.calibration]
    key = library_key(space, costs, list(evaluator.devices.values()), tensors)
    path = run / LIBRARY
    known = read_library(path, space, key)
    if known is not None:
        return known
    # Codebooks take the longest to fit, and change nothing but size.
    asked = [c for c in space.choices if c.kind is not Kind.CLUSTER or "size" in costs]
    errors = {c.name: _assumed(len(c.options), _UNKNOWN) for c in space.choices}
    # Dealt out in turn, so that every part has layers of every size.
    count = max(1, min(_PARTS * workers, len(asked)))
    parts = [tuple(c.name for c in asked[start::count]) for start in range(count)]
    progress.begin("library", count + 1)
    failed: dict[str, str] = {}
    lost: list[int] = []

    def done(job: Job, result: Metrics | Failure) -> None:
        if isinstance(result, Failure):
            # At the least they are not what the search begins with; the next session looks again.
            errors.update({name: _assumed(len(errors[name]), _FAILED) for name in parts[job.number]})
            failed.update(dict.fromkeys(parts[job.number], str(result)))
            lost.append(job.number)
        else:
            told, reasons = result["errors"], result["failed"]
            assert isinstance(told, dict)
            assert isinstance(reasons, dict)
            errors.update({name: tuple(values) for name, values in told.items()})
            failed.update(reasons)
        progress.advance()

    jobs = [Job(number, space.original(), evaluator.spec.seed, run) for number in range(count)]
    pool.run("option_errors", [(job, (parts[job.number],)) for job in jobs], done)
    table = option_table(evaluator, LocalErrors(errors, failed), costs)
    if not lost:
        write_library(path, table, key, f"what was recorded is kept; carry on with: planish resume {run}")
    progress.advance()
    return table


def _assumed(options: int, error: float) -> tuple[float, ...]:
    """The errors of options that nobody looked at: what they are is found out by evaluating them."""
    return (0.0, *[error] * (options - 1))
