"""Measures how the convolutions of a model are computed fastest, and keeps it for whatever is compiled later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compilers.kernel_times import database_of
from ..hwmodels.kernel_database import DatabaseError
from ..spaces.bit_widths import BFLOAT16
from ..spaces.quantize import deploy
from ..spaces.space import Candidate, Kind
from .table_measuring import TableLimits, TableMeasuring, reference_program

if TYPE_CHECKING:
    from ..compilers.tile_rivals import Contest
    from .evaluate import Evaluator
    from .progress import Progress

# Below this gain the choice that needs no measuring stays: repeated measurements differ by as much.
_GAIN = 1.03


def measure_tiles(evaluator: Evaluator, label: str, progress: Progress, limit_s: float = 120.0) -> dict[str, object]:
    """Times rivals of every convolution of the model, in float32, in int8 and where it is an option in bfloat16.

    Args:
        evaluator: Of the model.
        label: Of a device that is this machine.
        progress: Told of every step.
        limit_s: Of timing.

    Returns:
        A JSON object: `convolutions` that were not known, rivals that were `timed`, and what `changed`: the
        convolution's kernel, its tile before and after, and the gain.

    Raises:
        BusyMachine: others use the cores that measuring needs.
        DatabaseError: the database of kernel times cannot be read.
    """
    import torch

    from ..compilers.tile_rivals import contests
    from ..compilers.tvm_workloads import plan

    device, space = evaluator.devices[label], evaluator.proposal.space
    candidates = [space.original()]
    for width in (8, BFLOAT16):
        having = {c.name: width for c in space.choices if c.kind is Kind.BITS and width in c.options}
        if having:
            candidates.append(Candidate({**space.original().options, **having}))
    found: dict[str, Contest] = {}
    for candidate in candidates:
        program = torch.export.export(deploy(evaluator.build(candidate)), (evaluator.traced.example,))
        found |= {contest.convolution: contest for contest in contests(program, device)}
    works = {w.workload.key(): w for contest in found.values() for w in contest.works.values()}
    database = database_of(device)
    limits = TableLimits(0, 0, 0.0, len(works), limit_s, 0.0)
    measuring = TableMeasuring(device, database, limits, progress, database.times())
    measuring.kernels(list(works), works, plan(reference_program(), device), limit_s)
    tiles, changed = {}, []
    for contest in found.values():
        times = {
            tile: measuring.known[work.workload.key()].time
            for tile, work in contest.works.items()
            if work.workload.key() in measuring.known
        }
        taken = next(iter(contest.works))
        if taken not in times or not times[taken].quiet:
            continue
        quiet = {tile: time.median_s for tile, time in times.items() if time.quiet}
        best = min(quiet, key=quiet.__getitem__)
        gain = quiet[taken] / quiet[best]
        tiles[contest.convolution] = best if gain >= _GAIN else taken
        if gain >= _GAIN:
            work = contest.works[best].workload
            changed.append({"op": work.op, "shapes": dict(work.shapes), "from": taken, "to": best, "gain": gain})
    try:
        database.add_tiles(tiles)
    except DatabaseError as error:
        measuring.notes.append(f"tiles are not kept: {error}")
    return {
        "convolutions": len(found),
        "timed": sum(key in measuring.known for key in works),
        "kept": len(tiles),
        "changed": changed,
        "notes": measuring.notes,
    }
