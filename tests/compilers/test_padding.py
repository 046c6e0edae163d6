"""Zeros that are added before a convolution are read by its kernel, where that is the same; torch says if it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from planish.compilers.tvm_workloads import plan
from planish.compilers.verify import INT8_TOLERANCE
from planish.hwmodels.device import host
from planish.spaces import Candidate, Kind
from planish.spaces.apply import apply
from planish.spaces.propose import propose
from planish.spaces.quantize import deploy
from planish.spaces.trace import trace

pytestmark = pytest.mark.tvm

Compile = Callable[..., Any]
SHAPE = (1, 3, 13, 9)


class Padded(nn.Module):
    """Layers after each other, with zeros around the input of each: (left, right, top, bottom)."""

    def __init__(self, layers: list[nn.Module], around: list[tuple[int, int, int, int]], value: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.around, self.value = nn.ModuleList(layers), around, value

    def forward(self, x: Tensor) -> Tensor:
        for layer, sides in zip(self.layers, self.around, strict=True):
            x = layer(pad(x, sides, value=self.value)).relu()
        return x


class Twice(nn.Module):
    """A padded value that two convolutions read, and with `also` something else."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.also = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3, padding=1), also

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, (1, 1, 0, 1))
        y: Tensor = self.a(x) + self.b(x)[:, :, 1:-1, 1:-1]
        return y + x.mean() if self.also else y


FOLDED = {
    "more at the end": Padded([nn.Conv2d(3, 16, 3, stride=2)], [(0, 1, 0, 1)]),
    "beside its own": Padded([nn.Conv2d(3, 16, 5, padding=1)], [(1, 2, 3, 0)]),
    "dilated": Padded([nn.Conv2d(3, 24, 3, dilation=2)], [(4, 2, 0, 3)]),
    "depthwise after another": Padded(
        [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, stride=2, groups=16)], [(1, 1, 1, 1), (0, 1, 0, 1)]
    ),
    "Winograd's form": Padded([nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3)], [(0, 0, 0, 0), (2, 1, 1, 2)]),
    "two readers": Twice(also=False),
}
KEPT = {
    "ones": Padded([nn.Conv2d(3, 16, 3)], [(1, 1, 1, 1)], value=1.0),
    "cropped on a side": Padded([nn.Conv2d(3, 16, 3)], [(-1, 1, 1, 1)]),
    "a window outside the image": Padded([nn.Conv2d(3, 16, 3)], [(3, 0, 0, 0)]),
    "another reader": Twice(also=True),
}


def paddings(module: nn.Module) -> int:
    """The kernels of a compiled model that only add zeros."""
    calls = plan(torch.export.export(module, (torch.zeros(SHAPE),)), host()).calls
    return sum("pad" in work.form for work in calls if work.op == "elementwise")


@pytest.mark.parametrize("name", [*FOLDED, *KEPT])
def test_what_is_padded_before_a_convolution_is_computed_as_torch_does(
    name: str, compile_model: Compile, difference: Compile
) -> None:
    module = {**FOLDED, **KEPT}[name].eval()
    assert paddings(module) == (name in KEPT)
    artifact = compile_model(module, SHAPE)
    assert difference(artifact) <= artifact.manifest.tolerance


@pytest.mark.parametrize("name", FOLDED)
def test_bytes_are_padded_with_their_zero_point(name: str, compile_model: Compile, difference: Compile) -> None:
    traced = trace(FOLDED[name].eval(), torch.randn(SHAPE))
    proposal = propose(traced, families=(Kind.BITS,))
    candidate = Candidate({choice.name: 8 for choice in proposal.space.choices})
    module = deploy(apply(candidate, traced, proposal, torch.randn(16, *SHAPE[1:])))
    assert paddings(module) == 0
    artifact = compile_model(module, SHAPE, tolerance=INT8_TOLERANCE)
    assert difference(artifact) <= INT8_TOLERANCE


def test_a_padding_that_is_the_models_result_stays(compile_model: Compile, difference: Compile) -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pad(x, (1, 0, 2, 0))

    artifact = compile_model(Last(), SHAPE)
    assert difference(artifact) == 0


def test_paddings_of_a_batch_that_is_cut_into_parts_are_read_too(
    compile_model: Compile, difference: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planish.compilers import tvm_batch
    from planish.compilers.cpu.sub_batch import SubBatch

    monkeypatch.setattr(tvm_batch, "sub_batch", lambda layers, cuts, batch, machine: SubBatch(max(cuts), 1))
    module = FOLDED["depthwise after another"].eval()
    artifact = compile_model(module, (2, *SHAPE[1:]))
    assert difference(artifact) <= artifact.manifest.tolerance
