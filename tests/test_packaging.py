"""The wheel holds the four folders, whole: an editable install hides a sub-folder or a kind of file not listed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("search", "spaces", "hwmodels", "compilers")


def _setuptools() -> int:
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that setuptools builds from a copy of the checkout, without the network."""
    if _setuptools() < 77:
        pytest.skip(f"setuptools {_setuptools()} cannot build this project offline; it needs 77 or newer")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_exactly_the_files_of_the_four_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    files = (path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    expected = {
        f"planish/{path.as_posix()}"
        for path in files
        if "__pycache__" not in path.parts and not any(part.startswith(".") for part in path.parts)
    }
    assert held == expected


def test_wheel_installs_the_command_and_nothing_outside_planish(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "planish = planish.search.cli:main" in archive.read(entry_points).decode()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"planish"}


def test_the_command_answers_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Isolated from the checkout, its editable install and PYTHONPATH.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]; "
        "import planish.search.cli as cli; print(cli.__file__); cli.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
