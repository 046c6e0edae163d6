"""What the compiler tests share: kernels run on this CPU, blocked layouts, and models compiled and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
        # What the kernel forgets to write stays NaN, or a byte that no test expects everywhere.
        poison = np.full(shape, 0xA5 if dtype == "uint8" else np.nan, dtype)
        tensors = [tvm.runtime.tensor(a) for a in (*arguments, poison)]
        library["main"](*tensors)
        result: Array = tensors[-1].numpy()
        return result

    return run
