"""Models whose operators read parameters, and models that share kernels of another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from planish.compilers.compiler import Artifact
from planish.compilers.runner import check
from planish.compilers.tvm_compiler import TvmCompiler
from planish.hwmodels.device import host

pytestmark = pytest.mark.tvm


class OfParameters(nn.Module):
    """One operator of ours on a parameter, joined with the input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.gate = nn.Parameter(torch.linspace(-2, 2, 12).reshape(1, 12))
        self.image = nn.Parameter(torch.linspace(-2, 2, 2 * 12).reshape(1, 2, 3, 4))
        self.linear = nn.Linear(12, 12)
        self.conv = nn.Conv2d(2, 12, (3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {
            "sigmoid": lambda: torch.sigmoid(self.gate),
            "softmax": lambda: torch.softmax(self.gate, 1),
            "linear": lambda: self.linear(self.gate),
            "convolution": lambda: self.conv(self.image).flatten(1),
            "pooling": lambda: nn.functional.max_pool2d(self.image, (1, 2)).flatten(1),
        }
        return x * made[self.name]()  # type: ignore[no-any-return,no-untyped-call]


def compiled(module: nn.Module, example: torch.Tensor, folder: Path) -> Artifact:
    program = torch.export.export(module.eval(), (example,))
    return TvmCompiler().compile(program, host(), folder, torch.randn(3, *example.shape), tolerance=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "linear", "convolution", "pooling"])
def test_an_operator_may_read_a_parameter(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    artifact = compiled(OfParameters(name), torch.randn(1, 12), tmp_path / "model")
    assert check(artifact.path, host()) <= 1e-4


def test_models_of_other_channels_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of 40 and of 48 channels are of as many blocks: what is stored of one has to serve the other."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    for channels in (48, 40):
        model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.MaxPool2d(2), nn.Conv2d(channels, 16, 3))
        artifact = compiled(model, torch.randn(1, 3, 12, 12), tmp_path / str(channels))
        assert check(artifact.path, host()) <= 1e-4
