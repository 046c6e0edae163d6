"""Kernels compiled in several threads: the same object code, and one that cannot be compiled costs only itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.compilers import cores as cores_file
from planish.compilers.cores import cores, limit_cores
from planish.compilers.kernel_store import KernelStore
from planish.hwmodels.device import host


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores_file, "_limit", None)


def test_a_limit_holds_and_allows_no_more_than_there_are() -> None:
    here = cores()
    assert 1 <= here <= (os.cpu_count() or 1)
    limit_cores(1)
    assert cores() == 1
    limit_cores(here + 5)
    assert cores() == here
    with pytest.raises(ValueError, match="the least is 1"):
        limit_cores(0)


@pytest.fixture
def kernels() -> tuple[list[Any], Any]:
    """Kernels of a small model, and their target."""
    from planish.compilers import tvm_build

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()
    found = tvm_build.fused(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), host())
    return found.kernels, found.target


@pytest.mark.tvm
def test_the_code_does_not_depend_on_the_number_of_threads(
    kernels: tuple[list[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planish.compilers import tvm_build

    codes = []
    for count in (1, 3):
        monkeypatch.setattr(tvm_build, "cores", lambda count=count: count)
        folder = tmp_path / str(count)
        folder.mkdir()
        files = tvm_build.kernel_objects(*kernels, folder, KernelStore(folder / "kernels.sqlite"))
        assert [file.stem for file in files] == [kernel.symbol for kernel in kernels[0]]
        codes.append([file.read_bytes() for file in files])
    assert codes[0] == codes[1]


@pytest.mark.tvm
def test_a_kernel_that_cannot_be_compiled_is_raised_or_told_and_the_others_are_kept(
    kernels: tuple[list[Any], Any], tmp_path: Path
) -> None:
    from dataclasses import replace

    from planish.compilers import tvm_build

    def broken() -> Any:
        raise ValueError("no such function")

    (first, *rest), target = kernels
    store = KernelStore(tmp_path / "kernels.sqlite")
    given = [replace(first, symbol="broken", key="broken", build=broken), *rest]
    with pytest.raises(ValueError, match="no such function"):
        tvm_build.kernel_objects(given, target, tmp_path, store)
    assert all(store.get(kernel.key) for kernel in rest)
    told: list[str] = []
    files = tvm_build.kernel_objects(given, target, tmp_path, store, lambda kernel, _: told.append(kernel.symbol))
    assert told == ["broken"]
    assert [file.stem for file in files] == [kernel.symbol for kernel in rest]
