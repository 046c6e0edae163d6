"""What tells quiet times of whole networks is known from kernels, whether the machine is quiet meanwhile or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planish.compilers import reference_timer
from planish.compilers.kernel_timer import Timed
from planish.compilers.reference_timer import quiet_network_s
from planish.compilers.remote import DeviceLost
from planish.compilers.runner import ChildResult
from planish.hwmodels.device import host
from planish.hwmodels.quiet import Samples

KERNEL_S, NETWORK_S = 1e-5, 1.5e-5
KERNEL: Any = object()


def machine(monkeypatch: pytest.MonkeyPatch, kernel_slower: list[float], network_slower: list[float]) -> list[str]:
    """Kernels and networks that are so much slower, the last for ever; what was timed, in turn."""
    seen: list[str] = []

    def turns(values: list[float]) -> Iterator[float]:
        yield from values
        while True:
            yield values[-1]

    kernels, networks = turns(kernel_slower), turns(network_slower)

    def time_kernels(works: dict[str, Any], *_: object) -> Timed:
        seen.append("kernel")
        [name] = works
        seconds = KERNEL_S * next(kernels)
        return Timed({name: Samples((seconds,) * 6, (seconds,) * 6)}, seconds, {})

    def run_child(artifacts: dict[str, Path], device: object, protocol: Any) -> ChildResult:
        seen.append("network")
        slower = next(networks)
        return ChildResult({name: [NETWORK_S * slower] * protocol.runs for name in artifacts}, {}, {})

    monkeypatch.setattr(reference_timer, "time_kernels", time_kernels)
    monkeypatch.setattr(reference_timer, "run_child", run_child)
    return seen


def test_only_what_was_timed_between_two_quiet_times_of_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second network is the fastest that was seen, but nobody knows whether its machine was quiet.
    seen = machine(monkeypatch, [1.05, 1.0, 1.4, 1.02, 1.1, 1.0], [1.02, 0.5, 0.5, 1.01, 1.04])
    found = quiet_network_s(Path("network"), KERNEL, KERNEL_S, host())
    assert found is not None
    assert found[0] == pytest.approx(NETWORK_S * 1.01, rel=0.01)
    assert found[1]
    assert seen == ["kernel", *["network", "kernel"] * 5]


def test_on_a_machine_that_is_never_quiet_the_kernel_tells_how_much_slower_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = machine(monkeypatch, [1.5], [1.5, 1.5, 1.8])
    found = quiet_network_s(Path("network"), KERNEL, KERNEL_S, host())
    assert found is not None
    assert found[0] == pytest.approx(NETWORK_S * 1.2)
    assert not found[1]
    assert seen.count("network") < 12  # it comes to an end


def test_a_kernel_that_does_not_run_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, [1.0], [1.0])
    monkeypatch.setattr(reference_timer, "time_kernels", lambda *_: Timed({}, 0.0, {"reference": "crashed"}))
    assert quiet_network_s(Path("network"), KERNEL, KERNEL_S, host()) is None


def test_a_device_that_is_lost_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, [1.0], [1.0])
    lost = DeviceLost("device board is lost: no answer")
    monkeypatch.setattr(reference_timer, "time_kernels", lambda *_: Timed({}, 0.0, {}, lost))
    with pytest.raises(DeviceLost, match="board is lost"):
        quiet_network_s(Path("network"), KERNEL, KERNEL_S, host())
