"""The library phase of a search: the errors of all options on the workers, then the table, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..spaces.local_error import LocalErrors
from .library import option_table
from .library_file import library_key, read_library, write_library
from .option_table import OptionTable
from .progress import Progress
from .workers import Failure, Pool

if TYPE_CHECKING:
    from .evaluate import Evaluator, Job, Metrics
    from .rundir import RunDirectory

LIBRARY = "library.json"
# Parts for every worker: few, because each runs the original once; more than one, because parts differ in length.
_PARTS = 2


def library(
    evaluator: Evaluator, folder: RunDirectory, pool: Pool, workers: int, costs: Sequence[str], progress: Progress
) -> OptionTable:
    """The run's table of options, made on the workers unless the run has it.

    Args:
        evaluator: Of the run.
        folder: Of the run.
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
    path = folder.path / LIBRARY
    known = read_library(path, space, key)
    if known is not None:
        return known
    # Dealt out in turn, so that every part has layers of every size.
    count = max(1, min(_PARTS * workers, len(space.choices)))
    parts = [tuple(c.name for c in space.choices[start::count]) for start in range(count)]
    progress.begin("library", count + 1)
    errors: dict[str, tuple[float, ...]] = {}
    failed: dict[str, str] = {}

    def done(job: Job, result: Metrics | Failure) -> None:
        if isinstance(result, Failure):
            # Its options are as good as any: what they are is found out by evaluating them.
            for choice in space.choices:
                if choice.name in parts[job.number]:
                    errors[choice.name] = (0.0, *[1e-3] * (len(choice.options) - 1))
                    failed[choice.name] = str(result)
        else:
            told, reasons = result["errors"], result["failed"]
            assert isinstance(told, dict)
            assert isinstance(reasons, dict)
            errors.update({name: tuple(values) for name, values in told.items()})
            failed.update(reasons)
        progress.advance()

    jobs = [Job(number, space.original(), evaluator.spec.seed, folder.path) for number in range(count)]
    pool.run("option_errors", [(job, (parts[job.number],)) for job in jobs], done)
    table = option_table(evaluator, LocalErrors(errors, failed), costs)
    write_library(path, table, key, f"what was recorded is kept; carry on with: planish resume {folder.path}")
    progress.advance()
    return table
