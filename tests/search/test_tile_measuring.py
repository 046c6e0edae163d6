"""`planish profile --tiles`: what is fastest by measurement is kept, and compiled from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.compilers.kernel_times import database_of
from planish.compilers.pinned import pinned
from planish.hwmodels.device import parse_device
from planish.hwmodels.kernel_database import KernelTime
from planish.hwmodels.quiet import Settled
from planish.search import table_measuring
from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.evaluate import Evaluator
from planish.search.progress import Progress
from planish.search.table_measuring import TableMeasuring
from planish.search.tasks import Task
from planish.search.tile_measuring import measure_tiles

pytestmark = pytest.mark.tvm


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_measuring, "refuse_loaded", lambda watch, device: None)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    split = Split(torch.randn(8, 3, 12, 12), torch.arange(8) % 4)
    task = Task(model, Data(split, split, split, tuple("abcd")), "own")
    return Evaluator(load_spec(None, {"model": "own", "data": "own", "device": "cpu"}), task)


def convolutions(evaluator: Evaluator) -> int:
    """Two layers, in float32, in int8, and where the device has it in bfloat16."""
    return 2 * (3 if "avx512_bf16" in evaluator.devices["cpu"].features else 2)


def told(law: Callable[[int], tuple[float, bool]]) -> Callable[..., None]:
    """Instead of timing: (seconds, quiet) by the number of a kernel in the order in which they are asked for."""

    def kernels(
        self: TableMeasuring, wanted: Sequence[str], works: Mapping[str, Any], reference: Any, limit_s: float
    ) -> None:
        for number, key in enumerate(wanted):
            seconds, quiet = law(number)
            self.known[key] = KernelTime(works[key].workload, Settled(seconds, seconds, seconds, 9, quiet))

    return kernels


def test_the_fastest_is_kept_and_compiled_from_then_on(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableMeasuring, "kernels", told(lambda number: (1e-5 - 1e-7 * number, True)))
    result = measure_tiles(evaluator, "cpu", Progress(None))
    assert result["convolutions"] == result["kept"] == convolutions(evaluator)
    changed = result["changed"]
    assert isinstance(changed, list)
    # Later ones take less: of every convolution the last rival, by 3 % or more, is taken.
    assert len(changed) == convolutions(evaluator)
    assert all(entry["gain"] >= 1.03 and entry["from"] != entry["to"] for entry in changed)
    tuned = pinned(parse_device("cpu"))
    assert sorted(tuned.tiles.values()) == sorted(entry["to"] for entry in changed)
    # A second time nothing is left to measure.
    evaluator.devices["cpu"] = tuned
    assert measure_tiles(evaluator, "cpu", Progress(None))["convolutions"] == 0


def test_gains_within_the_noise_and_times_of_a_busy_machine_change_nothing(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableMeasuring, "kernels", told(lambda number: (1e-5 - 1e-9 * number, True)))
    result = measure_tiles(evaluator, "cpu", Progress(None))
    assert (result["kept"], result["changed"]) == (convolutions(evaluator), [])
    database_of(evaluator.devices["cpu"]).path.unlink()
    monkeypatch.setattr(TableMeasuring, "kernels", told(lambda number: (1e-5 - 1e-7 * number, False)))
    result = measure_tiles(evaluator, "cpu", Progress(None))
    assert (result["kept"], result["changed"]) == (0, [])
    assert pinned(parse_device("cpu")).tiles == {}


def test_measured_for_real_every_tile_is_one_that_was_timed(evaluator: Evaluator) -> None:
    result = measure_tiles(evaluator, "cpu", Progress(None), limit_s=5.0)
    tiles = pinned(parse_device("cpu")).tiles
    assert len(tiles) == result["kept"]
    times = database_of(evaluator.devices["cpu"]).times()
    forms = " ".join(time.workload.form for time in times.values())
    assert times
    assert all(tile in forms for tile in tiles.values())


def test_a_damaged_database_costs_the_tiles_and_nothing_else(
    evaluator: Evaluator, caplog: pytest.LogCaptureFixture
) -> None:
    path = database_of(evaluator.devices["cpu"]).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no database" * 1000)
    assert pinned(parse_device("cpu")).tiles == {}
    assert "kernel database" in caplog.text
