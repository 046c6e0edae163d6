"""A schedule for functions that have no kernel of their own: inline, vectorise, spread over threads."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError

# Below this many elements a second thread costs more than it saves.
_PARALLEL_ELEMENTS = 32_768


def schedule_rest(module: tvm.IRModule, lanes: int, threads: int) -> tvm.IRModule:
    """Schedules every function of a module but `main`."""
    for var, function in list(module.functions_items()):
        if isinstance(function, tvm.tirx.PrimFunc):
            module.update_func(var, _scheduled(function, lanes, threads))
    return module


def _scheduled(function: tvm.tirx.PrimFunc, lanes: int, threads: int) -> tvm.tirx.PrimFunc:
    s = Schedule(tvm.IRModule({"main": function}))
    try:
        _inline(s)
        for block in _blocks(s):
            _loops(s, block, lanes, threads)
    except ScheduleError:
        # A function that these rules do not fit is compiled as it is: slow, and still right.
        return function
    return s.mod["main"].with_attrs(dict(function.attrs)) if function.attrs else s.mod["main"]


def _blocks(s: Schedule) -> list[Any]:
    return list(s.get_child_blocks(s.get_sblock("root")))


def _inline(s: Schedule) -> None:
    """Inlines elementwise producers into their readers."""
    for block in _blocks(s)[:-1]:
        if _reductions(s, block):
            continue
        try:
            s.compute_inline(block)
        except ScheduleError:
            continue  # an output, or read by what cannot take it


def _reductions(s: Schedule, block: Any) -> int:
    return sum(1 for var in s.get(block).iter_vars if var.iter_type == tvm.tirx.IterVar.CommReduce)


def _loops(s: Schedule, block: Any, lanes: int, threads: int) -> None:
    loops, reductions = s.get_loops(block), _reductions(s, block)
    spatial = loops[: len(loops) - reductions]
    if not spatial:
        return
    extents = [int(s.get(loop).extent) for loop in spatial]
    total = 1
    for extent in extents:
        total *= extent
    if reductions:
        # The last spatial axis of a product (matmul, softmax over rows) is contiguous: sum whole vectors of it.
        vector = None
        if len(spatial) > 1 and extents[-1] % lanes == 0 and extents[-1] > 1:
            outer, vector = s.split(spatial[-1], [None, lanes])
            s.reorder(*spatial[:-1], outer, *loops[len(spatial) :], vector)
            s.vectorize(vector)
        # Before decomposing: afterwards the update is no reduction block any more, and refuses it.
        if threads > 1 and total >= _PARALLEL_ELEMENTS:
            s.parallel(s.fuse(*spatial[:-1]) if len(spatial) > 1 else spatial[0])
        if vector is not None:
            init = s.decompose_reduction(block, loops[len(spatial)])
            s.vectorize(s.get_loops(init)[-1])
        return
    whole = s.fuse(*spatial)
    if total % lanes == 0 and total > lanes:
        whole, vector = s.split(whole, [None, lanes])
        s.vectorize(vector)
    if threads > 1 and total >= _PARALLEL_ELEMENTS:
        s.parallel(whole)
