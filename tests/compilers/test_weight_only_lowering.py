"""Dense layers of whole weights on float inputs, compiled and beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planish.hwmodels.device import host
from planish.spaces.quantize import deploy
from planish.spaces.weight_only import WeightQuantized

pytestmark = pytest.mark.tvm

Compile = Callable[..., Any]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 51])
def test_whole_weights_on_float_inputs_run_as_bytes_or_halves(
    bits: int, inputs: int, compile_model: Compile, difference: Compile
) -> None:
    from planish.compilers.tvm_workloads import plan

    wide = WeightQuantized(nn.Linear(inputs, 77), bits)
    model = deploy(nn.Sequential(wide, nn.GELU(), nn.Linear(77, 5)).eval())
    artifact = compile_model(model, (3, inputs))
    assert difference(artifact) <= artifact.manifest.tolerance
    assert [kernel.partition("_")[0] for kernel, _ in artifact.manifest.kernels] == ["wdense", "dense"]
    found = plan(torch.export.export(model, (torch.zeros(3, inputs),)), host())
    # The last block is filled up, and two values a channel are beside the weights.
    size = 0.5 if bits == 4 and inputs % 8 == 0 else 1
    assert inputs * 77 * size <= found.calls[0].weight_bytes <= inputs * 80 * size + 2 * 80 * 4
    assert found.calls[0].bits == 32
