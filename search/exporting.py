"""`planish export`: one model of a run in a folder of its own, that runs without planish and without the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from ..compilers.compiler import RunError
from ..compilers.cpu_features import BY_FILE, device_of, instruction_set
from ..compilers.manifest import EXAMPLES, Manifest, ManifestError, digest, read
from ..compilers.manifest import NAME as MANIFEST
from ..compilers.runner import check
from ..hwmodels.device import DeviceError
from .artifact_path import artifact_path, path_name
from .errors import UserError
from .export_cpp import example_bytes, model_header
from .front import choose
from .how_predicted import how_predicted
from .json_text import mapping
from .new_folder import new_folder
from .objective import parse_budget
from .rundir import FRONT, RunDirectory
from .task_note import TaskNote, read_task
from .trial import State, finite

ORIGINAL = "original"
_WEIGHTS = "weights.safetensors"
_PROGRAMS = ("run_model.py", "run_model.cpp", "build.sh")


@dataclass(frozen=True)
class _Source:
    """The compiled model of a trial for one device, and the original's (None where it is the original).

    `file` is the name of the TOML file that describes the device, empty where none does.
    """

    label: str
    folder: Path
    manifest: Manifest
    original: Path | None
    file: str


def export_run(run: Path, pick: str | None, trial: int | None, out: Path) -> dict[str, object]:
    """Writes one model of a run into a new folder: `OUT`, or `OUT/DEVICE` for each of several devices.

    Args:
        run: A run's folder, finished or not.
        pick: A budget: the most accurate model of the front that keeps it. None: the run's own budget.
        trial: Any complete trial instead, 0 for the original.
        out: Must not exist, or be an empty folder.

    Returns:
        A JSON object: `folder`, `run`, `trial`, `keeps_budget`, `metrics`, `latency` (how it was predicted; None where
        it was measured), and `models`, one for each device, with the largest difference from the stored outputs
        (`max_error`), or with what this machine lacks to run it.

    Raises:
        UserError: there is no such run or model, its files are missing or changed, it does not compute here what it
            did, or `out` cannot be written; in no case is anything left in `out`.
    """
    folder = RunDirectory.open(run)
    spec = folder.spec()
    labels = spec.labels()
    entry = _trial(folder, trial) if trial is not None else _pick(folder, pick, labels)
    number = int(str(entry["trial"]))
    files = [Path(name).name if name.endswith(".toml") else "" for name in spec.device]
    sources = [_source(folder, number, label, labels, file) for label, file in zip(labels, files, strict=True)]
    weights = folder.trial_folder(number) / _WEIGHTS
    _check_weights(weights, number)
    note = read_task(run, spec)
    models: list[dict[str, object]] = []
    with new_folder(out, last=MANIFEST) as temporary:
        for source in sources:
            place = temporary if len(sources) == 1 else temporary / path_name(source.label)
            place.mkdir(exist_ok=True)
            manifest = _write(place, source, weights, entry, note)
            found = out / place.relative_to(temporary)
            models.append({"device": source.label, "folder": str(found), **_check(place, manifest)})
    return {
        "folder": str(out),
        "run": str(run),
        "trial": number,
        "keeps_budget": entry.get("meets_budget"),
        "metrics": finite(mapping(entry["metrics"])),
        "latency": how_predicted(_front(folder)) if spec.measure.latency == "predicted" else None,
        "models": models,
    }


def _pick(folder: RunDirectory, pick: str | None, labels: Sequence[str]) -> Mapping[str, object]:
    budgets = parse_budget(pick, labels) if pick is not None else ()
    return choose(folder.front(), budgets)


def _trial(folder: RunDirectory, number: int) -> Mapping[str, object]:
    """A complete trial as front.json would hold it; from there where it is, as it then has test metrics too."""
    trials = {trial.number: trial for trial in folder.trials()}
    complete = [n for n, trial in trials.items() if trial.state is State.COMPLETE]
    if number not in complete:
        state = f"trial {number} is {trials[number].state.value}" if number in trials else f"there is no trial {number}"
        known = ", ".join(map(str, complete))
        raise UserError(f"{state} in {folder.path}; " + (f"complete are {known}" if known else "none is complete yet"))
    for entry in _listed(folder):
        if entry.get("trial") == number:
            return entry
    trial = trials[number]
    found = (folder.trial_file(number, "recipe.json") or {}).get("recipe")
    return {"trial": number, "options": trial.candidate.options, "metrics": trial.metrics, "recipe": found}


def _listed(folder: RunDirectory) -> list[Mapping[str, object]]:
    front = _front(folder)
    listed = front.get("front")
    return [mapping(entry) for entry in [front.get("original"), *(listed if isinstance(listed, list) else [])]]


def _front(folder: RunDirectory) -> Mapping[str, object]:
    """front.json, or nothing before there is one."""
    return folder.front() if (folder.path / FRONT).exists() else {}


def _source(folder: RunDirectory, number: int, label: str, labels: Sequence[str], file: str) -> _Source:
    path = artifact_path(folder.trial_folder(number), labels, label)
    original = artifact_path(folder.trial_folder(0), labels, label)
    try:
        if number:
            read(original)
        return _Source(label, path, read(path), original if number else None, file)
    except ManifestError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"trial {number} cannot be exported: {reason}; restore the run's folder from a copy, or search again "
            "with another --out"
        ) from None


def _check_weights(path: Path, number: int) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors says of any file that it may not read that it is not there
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"trial {number} cannot be exported: {path} cannot be read ({error}); restore it from a copy, or name "
            "another trial with --trial"
        ) from None


def _write(place: Path, source: _Source, weights: Path, entry: Mapping[str, object], note: TaskNote) -> Manifest:
    """Fills a folder; the manifest comes last."""
    if source.original is not None:
        base = read(source.original)
        _copy_artifact(source.original, base, place / ORIGINAL)
        replace(base, target=_target(base, source.file), model={"task": note.name, "trial": 0}).write(place / ORIGINAL)
    _copy_artifact(source.folder, source.manifest, place)
    shutil.copyfile(weights, place / _WEIGHTS)
    if source.manifest.compiler == "tvm":
        _write_programs(place, source.manifest, note)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    manifest = replace(
        source.manifest,
        target=_target(source.manifest, source.file),
        files={path.relative_to(place).as_posix(): digest(path) for path in files},
        model={
            "task": note.name,
            "metric": note.metric,
            "device": source.label,
            "trial": entry["trial"],
            "options": dict(mapping(entry["options"])),
            "metrics": finite(mapping(entry["metrics"])),
            "recipe": finite(mapping(entry.get("recipe"))) or None,
            "preprocessing": dict(note.preprocessing),
            "classes": list(note.classes),
        },
    )
    manifest.write(place)
    return manifest


def _copy_artifact(source: Path, manifest: Manifest, place: Path) -> None:
    for name in (manifest.library, EXAMPLES):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, place / name)


def _write_programs(place: Path, manifest: Manifest, note: TaskNote) -> None:
    """The Python and the C++ program that run the model, and what the latter needs."""
    for name in _PROGRAMS:
        # What is no text of ours must not be taken for a module of planish's by what looks through its folders.
        stored = name if name.endswith(".cpp") else f"{name}.txt"
        text = resources.files(__package__).joinpath("export_files", stored).read_text(encoding="utf-8")
        (place / name).write_text(text, encoding="utf-8")
    (place / "build.sh").chmod(0o755)
    (place / "model.h").write_text(model_header(manifest, note.classes), encoding="utf-8")
    (place / "example.bin").write_bytes(example_bytes(place / EXAMPLES))


def _target(manifest: Manifest, file: str) -> Mapping[str, str]:
    """The target with the instruction set; where none was recorded this machine's, on which `_check` then runs it.

    Code for a processor that is named is not this machine's.
    """
    own = {} if "mtriple" in manifest.target else instruction_set()
    return {**own, **manifest.target, **({BY_FILE: file} if file else {})}


def _check(place: Path, manifest: Manifest) -> dict[str, object]:
    """Runs the stored examples in a fresh process with the runtime alone, if this machine can."""
    try:
        device = device_of(manifest)
    except DeviceError as error:
        return {"tolerance": manifest.tolerance, "not_checked_here": str(error)}
    try:
        return {"tolerance": manifest.tolerance, "max_error": check(place, device)}
    except RunError as error:
        raise UserError(
            f"the model does not run as it did when it was compiled: {error}; nothing was exported"
        ) from None
