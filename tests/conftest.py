"""What every test may need: `planish` for child processes, and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = ROOT / ".namespace"

# Ray workers and other child processes do not see pytest's `pythonpath`.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NAMESPACE), os.environ.get("PYTHONPATH")]))

# A slow or busy machine is no failure.
settings.register_profile("planish", deadline=None)
settings.load_profile("planish")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what measures, or runs a Ray or searches of its own: it may not share the machine with other tests."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        measures = folder == "search" and (item.get_closest_marker("tvm") or item.get_closest_marker("ray"))
        if folder in ("hwmodels", "end_to_end") or measures:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets and weights: PLANISH_DATA, or shared/data beside the checkout."""
    named = os.environ.get("PLANISH_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set PLANISH_DATA to the folder that holds cifar10/ and weights/")
    return folder
