"""Loads a compiled model with the runtime it needs: TVM's runtime library, or torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest

# A server that has just lost a session to a crash takes a moment until it takes the next.
_TRIES, _BETWEEN_S = 10, 1.0


class Loaded(Protocol):
    """A compiled model in this process."""

    manifest: Manifest

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """The output of one input, shapes as in the manifest."""
        ...

    def time(self, number: int) -> float:
        """Mean seconds of so many runs on the last input, without copying inputs and outputs."""
        ...

    def kernels(self, x: NDArray[Any], repeats: int) -> list[tuple[str, float]]:
        """Every kernel's name and its fastest of so many runs in seconds, in the order of the calls."""
        ...


class _Tvm:
    def __init__(self, folder: Path, manifest: Manifest, session: Any = None) -> None:
        with torch_hidden():
            import tvm
            from tvm.runtime import vm

        self.manifest = manifest
        self._tvm = tvm
        if session is None:
            pin_caller(manifest.threads)
            self._device = tvm.cpu()
            library = tvm.runtime.load_module(str(folder / manifest.library))
        else:
            self._device = session.cpu()
            library = uploaded(session, folder / manifest.library)
        self._vm = vm.VirtualMachine(library, self._device)

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        tensor = self._tvm.runtime.tensor(np.ascontiguousarray(x), self._device)
        self._vm.set_input("main", tensor)
        return self._vm["main"](tensor).numpy()  # type: ignore[no-any-return]

    def time(self, number: int) -> float:
        evaluator = self._vm.time_evaluator("invoke_stateful", self._device, number=number, repeat=1)
        return float(evaluator("main").mean)

    def kernels(self, x: NDArray[Any], repeats: int) -> list[tuple[str, float]]:
        rows: list[tuple[str, float]] = []

        def instrument(function: Any, symbol: str, before: bool, _: Any, *arguments: Any) -> int:
            # A function of the program's own, one for every part of a batch, calls kernels in its turn.
            if before and callable(function) and not symbol.startswith("vm."):
                best = float("inf")
                for _ in range(repeats):
                    start = time.perf_counter()
                    function(*arguments)
                    best = min(best, time.perf_counter() - start)
                rows.append((symbol, best))
            return 0  # and now the call itself

        self._vm.set_instrument(instrument)
        self._vm["main"](self._tvm.runtime.tensor(np.ascontiguousarray(x)))
        return rows


class _RemoteTvm(_Tvm):
    """The same on a device behind RPC, whose clock times it; kernels cannot be told from each other from here."""

    def kernels(self, x: NDArray[Any], repeats: int) -> list[tuple[str, float]]:
        self.run(x)
        return [("model", min(self.time(1) for _ in range(repeats)))]


class _Torch:
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        import torch

        from ..spaces import bfloat16_ops, integer  # noqa: F401  # register the operators that models were saved with

        torch.set_num_threads(manifest.threads)
        self.manifest = manifest
        self._torch = torch
        self._module = torch.export.load(str(folder / manifest.library)).module()
        self._input: Any = None

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        self._input = self._torch.from_numpy(np.ascontiguousarray(x))
        with self._torch.inference_mode():
            return self._module(self._input).numpy()  # type: ignore[no-any-return]

    def time(self, number: int) -> float:
        with self._torch.inference_mode():
            start = time.perf_counter()
            for _ in range(number):
                self._module(self._input)
            return (time.perf_counter() - start) / number

    def kernels(self, x: NDArray[Any], repeats: int) -> list[tuple[str, float]]:
        self.run(x)
        return [("model", min(self.time(1) for _ in range(repeats)))]


def remote_session(rpc: str, threads: int, time_limit_s: float) -> Any:
    """A session on a device behind RPC, its pool set to so many threads.

    Raises:
        ConnectionError: nothing answers there, or not by that key.
    """
    with torch_hidden():
        from .remote import connect

        session = connect(rpc, time_limit_s)
    # 1: the pool takes the fastest cores.
    session.get_function("runtime.config_threadpool")(1, threads)
    return session


def answers(rpc: str) -> bool:
    """Whether a device behind RPC gives a new session: what ended the last one was then the code in it."""
    for _ in range(_TRIES):
        try:
            remote_session(rpc, 1, _TRIES * _BETWEEN_S)
        except Exception:  # whatever TVM raises: it does not, for now
            time.sleep(_BETWEEN_S)
        else:
            return True
    return False


def uploaded(session: Any, library: Path) -> Any:
    """The module of a library that was sent to the device, under a name of its own."""
    # One file for every module: the device may have the last one of the same name loaded.
    name = f"{uuid4().hex}.so"
    session.upload(str(library), name)
    return session.load_module(name)


def pin_caller(threads: int) -> None:
    """Keeps the calling thread on the first core where a model uses several, if that core is allowed to it.

    TVM pins the workers of its pool to the other cores and not the caller, which computes too: left to the operating
    system it shares a core with a worker for much of the time.
    """
    if threads < 2 or not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    if 0 in allowed and len(allowed) >= threads:
        os.sched_setaffinity(0, {0})


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Keeps TVM from importing torch wherever that is installed: an artifact needs none, and it takes seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules["torch"]


LOADERS: Mapping[str, Callable[[Path, Manifest], Loaded]] = {"tvm": _Tvm, "torch": _Torch}
# With a session besides.
REMOTE_LOADERS: Mapping[str, Callable[[Path, Manifest, Any], Loaded]] = {"tvm": _RemoteTvm}
