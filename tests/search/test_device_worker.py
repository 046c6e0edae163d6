"""A node of a cluster that is the device: it says what it is, times what it is given, and comes back when killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from planish.compilers.compiler import RunError
from planish.compilers.pinned import pinned
from planish.compilers.remote import DeviceLost
from planish.hwmodels.device import parse_device
from planish.hwmodels.fingerprint import fingerprint
from planish.hwmodels.measurement import MeasureProtocol
from planish.search.device_worker import DeviceWorker, _Timing, offered

pytestmark = [pytest.mark.ray, pytest.mark.tvm]

QUICK = MeasureProtocol(runs=3, processes=1, warmup_s=0, retries=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=1, resources={"device:cpu": 1}, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_it_times_names_what_fails_and_comes_back(models: SimpleNamespace, tmp_path: Path) -> None:
    assert offered("cpu?threads=2")
    assert not offered("cpu/cortex-a72")
    worker, beside = DeviceWorker("cpu"), DeviceWorker("cpu?threads=2")
    assert beside.device().threads == 2
    beside.close()
    here = pinned(parse_device("cpu"))
    assert worker.device() == here
    assert here.target["mcpu"] != "host"
    assert fingerprint(here) == fingerprint(parse_device("cpu"))
    artifacts = {"original": models.original, "smaller": models.smaller}
    found = worker.measure(artifacts, QUICK)
    assert {name: len(m.run_s) for name, m in found.items()} == {"original": 3, "smaller": 3}
    assert worker.site_times(artifacts, QUICK).keys() == artifacts.keys()
    with pytest.raises(RunError, match="manifest") as caught:
        worker.measure({"original": models.original, "none": tmp_path}, QUICK)
    assert (caught.value.artifact, isinstance(caught.value, DeviceLost)) == ("none", False)
    _kill()
    with pytest.raises(DeviceLost, match="the device worker of cpu is lost"):
        worker.measure(artifacts, QUICK)
    for _ in range(60):
        with suppress(DeviceLost):
            assert worker.measure(artifacts, QUICK).keys() == artifacts.keys()
            break
        time.sleep(0.5)
    else:
        pytest.fail("it never came back")
    worker.close()


def test_a_node_with_another_processor_does_not_time_for_the_first() -> None:
    here = _Timing("cpu").call("device", (), "")
    assert isinstance(_Timing("cpu").call("device", (), here.identity), type(here))
    lost = _Timing("cpu").call("measure", ({}, QUICK), "0123456789abcdef")
    assert isinstance(lost, DeviceLost)
    assert "device:cpu now has another processor" in str(lost)


def _kill() -> None:
    """Kills the worker's process."""
    own = [p for p in psutil.Process().children(recursive=True) if "ray::_Timing" in " ".join(p.cmdline())]
    assert own
    for process in own:
        process.kill()
