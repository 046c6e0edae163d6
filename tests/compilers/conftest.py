"""What the compiler tests share: kernels run on this CPU, blocked layouts, and models compiled and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from planish.compilers import runner
from planish.compilers.compiler import Artifact
from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import Device, host

Array = NDArray[Any]

# Two threads of torch beside the compiled code's own only get in each other's way on a small machine.
torch.set_num_threads(1)


class Layout:
    """Blocked tensors by definition: channel c of (n, C, h, w) is lane c % lanes of block c // lanes."""

    @staticmethod
    def block(x: Array, lanes: int, fill: float = 0) -> Array:
        """(n, C, h, w) to (n, blocks, h, w, lanes); lanes beyond the last channel hold `fill`."""
        n, c, h, w = x.shape
        out = np.full((n, -(-c // lanes), h, w, lanes), fill, x.dtype)
        for channel in range(c):
            out[:, channel // lanes, :, :, channel % lanes] = x[:, channel]
        return out

    @staticmethod
    def unblock(x: Array, channels: int) -> Array:
        """The inverse of `block`."""
        lanes = x.shape[-1]
        return np.stack([x[:, c // lanes, :, :, c % lanes] for c in range(channels)], axis=1)


@pytest.fixture(scope="session")
def layout() -> type[Layout]:
    return Layout


@pytest.fixture(scope="session")
def run_kernel() -> Callable[[Any, Sequence[Array], tuple[int, ...], str], Array]:
    """Compiles a scheduled function for this CPU and runs it on arguments and a poisoned output buffer."""
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 2})

    def run(function: Any, arguments: Sequence[Array], shape: tuple[int, ...], dtype: str) -> Array:
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        library = tvm.compile(module, target=target)
        # What the kernel forgets to write stays NaN, or a number that no test expects everywhere.
        poison = np.full(shape, np.nan if dtype.startswith("float") else 0xA5, dtype)
        tensors = [tvm.runtime.tensor(a) for a in (*arguments, poison)]
        library["main"](*tensors)
        result: Array = tensors[-1].numpy()
        return result

    return run


@pytest.fixture
def compile_model(tmp_path: Path) -> Callable[..., Artifact]:
    """Compiles a module with TVM for this CPU, with the outputs that torch gives for two random inputs."""

    def compile_(model: nn.Module, shape: tuple[int, ...], device: Device | None = None, **named: Any) -> Artifact:
        generator = torch.Generator().manual_seed(1)
        examples = torch.randn((2, *shape), generator=generator)
        program = torch.export.export(model, (examples[0],))
        # float32 sums of a few hundred products, in another order.
        tolerance = named.pop("tolerance", 1e-5)
        folder = tmp_path / named.pop("name", "artifact")
        return TvmCompiler().compile(program, device or host(), folder, examples, tolerance=tolerance)

    return compile_


@pytest.fixture
def difference() -> Callable[..., float]:
    """How far an artifact's outputs are from the stored ones, relative to the largest, as a child process finds it."""

    def check(artifact: Artifact, device: Device | None = None) -> float:
        return runner.check(artifact.path, device or host())

    return check
