"""Coverage-guided fuzzing of everything that reads a file which others may have written or a disk damaged.

    pip install -e ".[fuzz]"
    python benchmarks/fuzz_readers.py            # 10 minutes a reader
    python benchmarks/fuzz_readers.py --quick    # 20 seconds a reader

A reader may return, or raise the error that its docstring names; anything else, or ten seconds on one input, is a
finding, whose input is kept in `--out`. Whatever a file says, no process may be started and nothing imported from its
folder: an audit hook ends the run where one is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

Row = dict[str, Any]
_HANG_S = 10
# Of a run's folder: every file that its readers open.
_RUN_FILES = ("trials.jsonl", "front.json", "space.json", "provenance.json", "spec.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 seconds a reader")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=int, default=600, help="of every reader")
    parser.add_argument("--readers", nargs="*", default=[], help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where inputs that fail are kept")
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.child:
        child(args.child, args.out, rest)
        return
    seconds = 20 if args.quick else args.seconds
    rows = []
    with tempfile.TemporaryDirectory(prefix="planish-fuzz-") as folder:
        for name in args.readers or READERS:
            rows.append(fuzzed(name, Path(folder, name), args.out, seconds))
            print(json.dumps(rows[-1]), file=sys.stderr)
    summary = {"runs": sum(row["runs"] for row in rows), "findings": sum(row["finding"] is not None for row in rows)}
    if args.json:
        from compiled_speed import machine

        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in summary.items()))


def fuzzed(name: str, folder: Path, out: Path, seconds: int) -> Row:
    """One reader, in a process of its own."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, __file__, "--child", name, "--out", str(folder), str(corpus), f"-max_total_time={seconds}",
        f"-timeout={_HANG_S}", f"-artifact_prefix={out / name}-", "-print_final_stats=1", "-max_len=8192",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    failed = re.search(r"=== Uncaught Python exception: ===\n(.*(?:\n.*){0,3})|ERROR: libFuzzer: (.*)", done.stderr)
    finding = None
    if done.returncode:
        finding = " ".join((failed.group(1) or failed.group(2)).split()) if failed else done.stderr[-300:]
    return {
        "reader": name,
        "seconds": seconds,
        "runs": int(runs.group(1)) if runs else 0,
        "covered": int(covered[-1]) if covered else 0,
        "finding": finding,
    }


def child(name: str, folder: Path, flags: list[str]) -> None:
    """Fuzzes one reader until its time is up; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["planish"], enable_loader_override=False):
        seed, read = READERS[name](folder)
    for number, content in enumerate(seed):
        (folder / "corpus" / f"seed{number}").write_bytes(content)
    sys.addaudithook(_no_code)
    atheris.Setup([sys.argv[0], *flags], read)
    atheris.Fuzz()


def _no_code(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn"):
        raise AssertionError(f"a file made its reader start something: {event} {arguments}")


def run_reader(file: str) -> Callable[[Path], tuple[list[bytes], Callable[[bytes], None]]]:
    """The readers of one file of a run's folder, the others sound."""

    def prepare(folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
        from planish.search.errors import UserError
        from planish.search.front import choose
        from planish.search.rundir import RunDirectory
        from planish.search.status import status

        run = sound_run(folder)

        def read(content: bytes) -> None:
            (run / file).write_bytes(content)
            with suppress(UserError):
                opened = RunDirectory.open(run)
                opened.spec()
                opened.history()
                opened.space()
                choose(opened.front(), ())
            with suppress(UserError):
                status(run)

        return [(run / file).read_bytes()], read

    return prepare


def sound_run(folder: Path) -> Path:
    """A run of two trials, without artifacts."""
    from planish.search.config import load_spec
    from planish.search.front import Entry, front_document
    from planish.search.objective import objectives_of
    from planish.search.rundir import RunDirectory
    from planish.search.trial import State, Trial
    from planish.spaces.space import Choice, Kind, SearchSpace

    space = SearchSpace((Choice("0", Kind.PRUNE, (0.0, 0.25, 0.5, 0.75)),), {})
    spec = load_spec(None, {"model": "m", "data": "d", "device": ["cpu"], "budget": "latency<=0.6x"})
    trials = []
    for number, (accuracy, latency) in enumerate([(0.9, 1e-3), (0.88, 5e-4)]):
        metrics = {
            "accuracy": accuracy,
            "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01],
            "latency_s": {"cpu": {"value": latency, "ci95": [latency, latency]}},
            "latency_ratio": {"cpu": latency / 1e-3},
            "size_bytes": 1000,
        }
        trials.append(Trial(number, space.decode([number]), State.COMPLETE, metrics, None, number))
    with RunDirectory.create(folder / "run", spec, {"created": "2026"}) as run:
        run.write_space(space)
        for trial in trials:
            run.append(trial)
        bounds = [budget.resolve(trials[0].metrics) for budget in spec.budgets()]
        objectives = objectives_of(["accuracy", "latency"], spec.labels())
        original, *entries = [Entry(trial, True, None) for trial in trials]
        run.write_front(front_document(objectives, bounds, original, entries))
    return folder / "run"


def specification(folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """A specification as a user writes it."""
    from planish.search.config import load_spec
    from planish.search.errors import UserError

    file = folder / "spec.toml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        with suppress(UserError):
            spec = load_spec(file, {})
            spec.budgets()
            spec.labels()

    text = 'model = "digits-resnet"\ndata = "digits32"\nbudget = "latency<=0.5x, size<=1/8x"\ndevice = ["cpu"]\n'
    return [
        text.encode(),
        text.encode() + b"[search]\ntrials = 10\n[distill]\nrungs = [1, 2]\nsurvivors = [4, 3]\n",
    ], read


def manifest(folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """An artifact's manifest."""
    from planish.compilers.manifest import Manifest, ManifestError, Port, digest
    from planish.compilers.manifest import read as read_manifest

    (folder / "model.so").write_bytes(b"library")
    port = Port("input", (1, 2), "float32")
    files = {"model.so": digest(folder / "model.so")}
    Manifest("tvm", "model.so", "cpu", {"kind": "llvm"}, 1, (port,), (port,), 1e-3, files).write(folder)

    def read(content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        with suppress(ManifestError):
            read_manifest(folder)

    return [(folder / "manifest.json").read_bytes()], read


def database(folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """The database of kernel times."""
    from planish.hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime
    from planish.hwmodels.quiet import Settled
    from planish.hwmodels.workload import Workload

    file, other = folder / "times.sqlite", folder / "other.sqlite"
    sound = KernelDatabase(file, "device", "version", "title")
    sound.add(
        [KernelTime(Workload("conv", "conv2d", {"rows": 3}, 10, 40), Settled(1e-5, 9e-6, 2e-5, 8, True))],
        {"kernel x": 1e-5},
    )
    content = file.read_bytes()

    def read(changed: bytes) -> None:
        file.write_bytes(changed)
        for journal in folder.glob("*.sqlite-*"):
            journal.unlink()
        known = KernelDatabase(file, "device", "version", "title")
        for step in (known.times, known.networks, known.contents, lambda: known.reference_s("kernel x")):
            with suppress(DatabaseError):
                step()
        other.unlink(missing_ok=True)
        with suppress(DatabaseError):
            KernelDatabase(other, "device", "version", "title").merge(file)

    return [content], read


def tensors(folder: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """Weights and checkpoints."""
    import torch

    from planish.search.distill_state import CheckpointError, load_checkpoint
    from planish.search.task_error import TaskError
    from planish.search.tensor_file import write_tensors
    from planish.search.weights import read_weights

    file, pickled = folder / "weights.safetensors", folder / "weights.pt"
    write_tensors(file, {"w": torch.zeros(3)}, {"options": {}, "epoch": 1})
    torch.save({"w": torch.zeros(3)}, pickled)
    seeds = [file.read_bytes(), pickled.read_bytes()]

    def read(content: bytes) -> None:
        for path in (file, pickled):
            path.write_bytes(content)
            with suppress(TaskError, CheckpointError):
                read_weights(path)
        with suppress(CheckpointError):
            load_checkpoint(file)

    return seeds, read


READERS: dict[str, Callable[[Path], tuple[list[bytes], Callable[[bytes], None]]]] = {
    "specification": specification,
    "manifest": manifest,
    "database": database,
    "tensors": tensors,
    **{file.partition(".")[0]: run_reader(file) for file in _RUN_FILES},
}


if __name__ == "__main__":
    main()
