"""The lines that the architecture draws: who imports whom, where heavy libraries live, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# An arrow of the architecture points to what is imported: a folder may use itself and those before it.
ORDER = ("spaces", "hwmodels", "compilers", "search")
# Where a library may be imported at all.
HOMES = {
    "tvm": ("compilers/*",),
    "tvm_ffi": ("compilers/*",),
    "ray": tuple(
        f"search/{name}.py" for name in ("workers", "rungs", "controller", "device_worker", "shipping", "counters")
    ),
    "optuna": ("search/sampler.py", "search/planish_sampler.py", "search/study_log.py", "search/study_space.py"),
    "sklearn": ("*",),
    "torch_pruning": ("*",),
    "PIL": ("*",),
    "psutil": ("*",),
}
# Of those, where the import may stand at the top of the file; elsewhere it stands inside the function that needs it.
_SCHEDULES = ("compilers/tvm_*.py", "compilers/cpu/*", "compilers/cuda/*", "compilers/fpga/*")
AT_TOP = {"tvm": _SCHEDULES, "tvm_ffi": _SCHEDULES}
# The command line, and child processes that speak to their parents over stdout.
PRINTERS = tuple(Path(file) for file in ("search/cli.py", "compilers/child.py", "compilers/kernel_child.py"))

FILES = sorted(path.relative_to(ROOT) for folder in ORDER for path in (ROOT / folder).rglob("*.py"))
OTHERS = sorted(path.relative_to(ROOT) for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def _imports(node: ast.AST, everywhere: bool) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of the imports below a node; without `everywhere` only of those that run on import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((0, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            # `from .. import x` may name a module or what a package holds; both are below the package.
            yield from ((child.level, f"{module}.{alias.name}".lstrip(".")) for alias in child.names)
        elif everywhere or not _is_put_off(child):
            yield from _imports(child, everywhere)


def _is_put_off(node: ast.AST) -> bool:
    """Whether what is below a node does not run on import: a function, or what only type checkers see."""
    function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    return function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def _target(path: Path, level: int, name: str) -> str:
    """What a relative import of a file reaches, dotted, from the folder: `spaces.space.Choice`."""
    package = list(path.parent.parts)
    # One level more than the folder is `planish` itself.
    base = ["planish", *package][: len(package) + 2 - level]
    return ".".join([*base, name]).removeprefix("planish.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_imports_only_its_own_folder_and_those_before_it_and_relatively(path: Path) -> None:
    for level, name in _imports(_tree(path), everywhere=True):
        first = name.partition(".")[0]
        if level == 0:
            assert first != "planish", f"{name} must be imported relatively: pyright sees two classes otherwise"
            assert first not in ORDER, f"a bare import of {name} finds another package of that name, or none"
        else:
            folder = _target(path, level, name).partition(".")[0]
            assert folder in ORDER, f"{name} (level {level}) reaches outside the four folders"
            assert ORDER.index(folder) <= ORDER.index(path.parts[0]), f"{path.parts[0]} must not import {folder}"


@pytest.mark.parametrize("path", OTHERS, ids=str)
def test_tests_and_benchmarks_import_planish_by_its_full_name(path: Path) -> None:
    for level, name in _imports(_tree(path), everywhere=True):
        assert level == 0, f"relative import of {name}"
        assert name.partition(".")[0] not in ORDER, f"a bare import of {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_are_imported_in_their_files_and_inside_functions(path: Path) -> None:
    tree = _tree(path)
    for level, name in _imports(tree, everywhere=True):
        library = name.partition(".")[0]
        if level == 0 and library in HOMES:
            assert any(fnmatch(str(path), home) for home in HOMES[library]), f"{library} has no business in {path}"
    for level, name in _imports(tree, everywhere=False):
        library = name.partition(".")[0]
        if level == 0 and library in HOMES:
            allowed = any(fnmatch(str(path), home) for home in AT_TOP.get(library, ()))
            assert allowed, f"{library} is imported at the top of {path}; import it inside the function that needs it"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {module: _needed(path, set(modules)) for module, path in modules.items()}
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done | {module}}:
        done |= ready
    assert not set(graph) - done, f"in or behind a circle of imports: {sorted(set(graph) - done)}"


def _needed(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file's import runs; a package's `__init__` counts where it is named, not as a parent."""
    needed = set()
    for level, name in _imports(_tree(path), everywhere=False):
        if level:
            target = _target(path, level, name)
            found = next((t for t in (target, target.rpartition(".")[0]) if t in modules), None)
            needed |= {found} if found else set()
    return needed


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("planish.spaces", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil"),
        ("planish.hwmodels", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil"),
        ("planish.compilers", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil"),
        ("planish.search", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil"),
        ("planish.search.cli", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil torch numpy"),
        ("planish.search.rundir", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil torch"),
        ("planish.search.report", "tvm tvm_ffi ray optuna sklearn torch_pruning PIL psutil torch"),
    ],
)
def test_importing_a_package_loads_no_heavy_library(package: str, forbidden: str) -> None:
    code = f"import sys, {package}; print(*sorted({set(forbidden.split())!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=str)
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", [path for path in FILES if path not in PRINTERS], ids=str)
def test_only_what_speaks_on_stdout_prints(path: Path) -> None:
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def test_planish_has_no_package_file_of_its_own() -> None:
    assert not (ROOT / ".namespace" / "planish" / "__init__.py").exists()
    assert {path.name for path in (ROOT / ".namespace" / "planish").iterdir()} == set(ORDER)
