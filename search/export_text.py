"""What `planish export` tells people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from .bench import error_text
from .quantities import metric_cells, metric_names


def export_text(result: Mapping[str, object]) -> str:
    """The result of `export_run` as lines: which model, its metrics, whether it was checked, and how to run it."""
    metrics = result["metrics"]
    assert isinstance(metrics, Mapping)
    names = metric_names([metrics])
    cells = ", ".join(f"{name} {cell}" for name, cell in zip(names, metric_cells(metrics, {}, names), strict=True))
    keeps = result["keeps_budget"]
    budget = "" if keeps is None else f", {'keeps' if keeps else 'does not keep'} the run's budget"
    lines = [f"{result['folder']}: {_name(result['trial'])} of {result['run']}{budget}", cells]
    lines += [f"latency is {result['latency']}"] if result["latency"] else []
    models = result["models"]
    assert isinstance(models, Sequence)
    for model in models:
        folder = shlex.quote(str(model["folder"]))
        lines += ["", f"for {model['device']}: {folder}"] if len(models) > 1 else []
        absent = model.get("not_checked_here")
        lines.append(
            f"not run here, as this machine lacks: {absent}"
            if absent
            else f"run in a fresh process with TVM's runtime alone: {error_text(model)}"
        )
        lines += [
            f"  from Python  python {folder}/run_model.py [INPUT.npy]",
            f"  from C++     sh {folder}/build.sh && {folder}/run_model [INPUT.bin [OUTPUT.bin]]",
            f"  time it      planish bench {folder}",
        ]
    return "\n".join(lines)


def _name(trial: object) -> str:
    return "the original (trial 0)" if trial == 0 else f"trial {trial}"
