"""Which recorded instructions keep a compiled model from running on this CPU."""

from __future__ import annotations

import platform

import pytest

from planish.compilers import cpu_features
from planish.compilers.cpu_features import described_instructions, instruction_set, lacking
from planish.hwmodels.device import parse_device


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 and what no compiler makes numeric code of."""
    monkeypatch.setattr(cpu_features, "cpu_flags", lambda: frozenset({"avx", "avx2", "fma", "hypervisor", "sse2"}))


@pytest.mark.usefixtures("flags")
def test_what_this_cpu_records_it_can_run() -> None:
    assert instruction_set() == {"machine": platform.machine(), "features": "avx avx2 fma"}
    assert lacking(instruction_set()) is None


@pytest.mark.usefixtures("flags")
def test_missing_instructions_are_named_in_order() -> None:
    recorded = {"machine": platform.machine(), "features": "avx2 avx512_vnni avx512f"}
    assert lacking(recorded) == "avx512_vnni, avx512f"


@pytest.mark.usefixtures("flags")
def test_another_kind_of_cpu_is_named_whatever_its_instructions() -> None:
    assert str(lacking({"machine": "z80", "features": ""})).startswith("a CPU of the kind z80")


@pytest.mark.usefixtures("flags")
def test_a_target_without_a_record_lacks_nothing() -> None:
    assert lacking({"kind": "llvm", "mcpu": "host"}) is None


def test_an_operating_system_that_lists_no_features_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "cpu_flags", frozenset)
    assert lacking({"machine": platform.machine(), "features": "avx2"}) is None


@pytest.mark.usefixtures("flags")
def test_a_description_says_what_its_code_needs() -> None:
    described = described_instructions(parse_device("cpu/cascadelake"))
    assert described == {"machine": "x86_64", "features": "avx2 avx512_vnni avx512f"}
    if platform.machine() == "x86_64":
        assert lacking(described) == "avx512_vnni, avx512f"
    assert "aarch64" in str(lacking(described_instructions(parse_device("cpu/cortex-a76"))))
