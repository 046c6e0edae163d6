"""The store of compiled kernels: what is kept, what is forgotten, and that its file's faults cost nothing else."""

from __future__ import annotations

import logging
import multiprocessing
import sqlite3
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.compilers.kernel_store import KernelStore, kernel_key
from planish.hwmodels.device import host


def test_what_is_stored_is_found_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.sqlite"
    KernelStore(path).put({"a": b"one", "b": b"two"})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(KernelStore(path).get, ("a",)) == b"one"
    assert KernelStore(path).get("c") is None


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    assert KernelStore(tmp_path / "kernels.sqlite").get("a") is None
    assert list(tmp_path.iterdir()) == []


def test_code_that_was_changed_is_not_used(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels.sqlite")
    store.put({"a": b"one"})
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE objects SET code = ?", (b"other",))
    assert store.get("a") is None


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels.sqlite", limit_bytes=10, clock=count().__next__)
    store.put({"a": b"1234"})
    store.put({"b": b"1234"})
    store.touch(["a"])
    store.put({"c": b"1234"})
    assert [store.get(key) is not None for key in "abc"] == [True, False, True]


@pytest.mark.parametrize("fault", ["garbage", "a folder", "another table", "no text"])
def test_a_file_that_cannot_be_used_is_named_once_and_costs_nothing_else(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.sqlite"
    if fault == "garbage":
        path.write_bytes(b"no database" * 1000)
    elif fault == "a folder":
        path.mkdir()
    elif fault == "no text":
        KernelStore(path).put({"b": b"two"})
        path.write_bytes(path.read_bytes().replace(b"CREATE TABLE objects", b"CREATE \x80ABLE objects"))
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE objects (name TEXT)")
    store = KernelStore(path)
    with caplog.at_level(logging.WARNING):
        store.put({"a": b"one"})
        assert store.get("a") is None
        store.touch(["a"])
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert "PLANISH_CACHE" in caplog.text


def test_a_key_tells_everything_apart() -> None:
    keys = [kernel_key("x", 1), kernel_key("x", "1"), kernel_key("x"), kernel_key("x", 1, None), kernel_key("x1")]
    assert len(set(keys)) == len(keys)
    assert kernel_key("x", 1) == keys[0]


@pytest.mark.tvm
def test_a_second_compilation_takes_every_kernel_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planish.compilers import tvm_build

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 8, 8),))
    store = KernelStore(tmp_path / "kernels.sqlite")
    first = tvm_build.build_library(program, host(), tmp_path / "first.so", store)
    monkeypatch.setattr(tvm_build, "_compiled", lambda *_: pytest.fail("a kernel was compiled again"))
    second = tvm_build.build_library(program, host(), tmp_path / "second.so", store)
    assert second == first
    assert len(first.kernels) == 3


@pytest.mark.tvm
def test_a_damaged_store_does_not_keep_a_model_from_being_compiled(tmp_path: Path) -> None:
    from planish.compilers import tvm_build

    path = tmp_path / "kernels.sqlite"
    path.write_bytes(b"no database" * 1000)
    program = torch.export.export(nn.Conv2d(3, 16, 3), (torch.randn(1, 3, 8, 8),))
    tvm_build.build_library(program, host(), tmp_path / "model.so", KernelStore(path))
    assert (tmp_path / "model.so").stat().st_size > 0
