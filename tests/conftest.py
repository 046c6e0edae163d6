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


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets and weights: PLANISH_DATA, or shared/data beside the checkout."""
    named = os.environ.get("PLANISH_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set PLANISH_DATA to the folder that holds cifar10/ and weights/")
    return folder
