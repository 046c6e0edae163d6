"""Four small models that between them hold every way in which channels are coupled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces.propose import Proposal, propose
from planish.spaces.trace import TracedModel, trace


class Block(nn.Module):
    """A basic residual block; without `convolve` a shortcut between widths subsamples and pads (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, convolve: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        self.pad = 0 if convolve else (outputs - inputs) // 2
        if convolve and (stride > 1 or inputs != outputs):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        z = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else self.shortcut(x)
        return F.relu(y + z)


class ResNet(nn.Module):
    """A CIFAR residual network (He et al. 2016) with so many blocks a stage."""

    def __init__(self, blocks: int, widths: tuple[int, int, int], convolve: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths)
        for stage in range(3):
            sizes = [before[stage], *[widths[stage]] * blocks]
            strides = [1 if stage == 0 else 2, *[1] * blocks]
            layers = [Block(i, o, s, convolve) for i, o, s in zip(sizes, sizes[1:], strides, strict=False)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(widths[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.get_submodule("layer3")(self.get_submodule("layer2")(self.get_submodule("layer1")(y)))
        out: Tensor = self.linear(F.avg_pool2d(y, y.shape[3]).flatten(1))
        return out


class Mobile(nn.Module):
    """An inverted residual, a concatenation of two branches, and linear layers behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False), nn.BatchNorm2d(64), nn.SiLU())
        self.project = nn.Sequential(nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.left = nn.Conv2d(32, 32, 3, 1, 1)
        self.right = nn.Conv2d(32, 48, (3, 5), 1, (1, 2))
        self.head = nn.Conv2d(80, 64, 3, 2, 1)
        self.fc1 = nn.Linear(64 * 4, 96)
        self.fc2 = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.project(self.depthwise(self.expand(y)))
        y = torch.cat([F.relu(self.left(y)), torch.sigmoid(self.right(y))], 1)
        y = F.adaptive_max_pool2d(F.relu(self.head(y)), 2).flatten(1)
        out: Tensor = self.fc2(F.relu(self.fc1(y)))
        return out


def mlp() -> nn.Module:
    """Linear layers with a batch norm and a nonlinearity that is not zero at zero."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Softplus(), nn.Linear(64, 10)
    )


@dataclass(frozen=True, eq=False)
class Net:
    """A model in eval mode with its trace and its default space."""

    name: str
    model: nn.Module
    calibration: Tensor

    @property
    def example(self) -> Tensor:
        return self.calibration[:1]

    @cached_property
    def traced(self) -> TracedModel:
        return trace(self.model, self.example)

    @cached_property
    def proposal(self) -> Proposal:
        return propose(self.traced)


_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: ResNet(1, (32, 32, 64), convolve=True), (3, 16, 16)),
    "resnet20": (lambda: ResNet(3, (16, 32, 64), convolve=False), (3, 16, 16)),
    "mobile": (Mobile, (3, 16, 16)),
    "mlp": (mlp, (64,)),
}


@pytest.fixture(scope="session")
def nets() -> dict[str, Net]:
    """All models by name, with random weights, statistics and 48 inputs of their own."""
    made = {}
    for seed, (name, (build, shape)) in enumerate(_MODELS.items()):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build().eval()
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                size = layer.num_features
                layer.weight.data = 0.5 + torch.rand(size, generator=generator)
                layer.bias.data = 0.3 * torch.randn(size, generator=generator)
                layer.running_mean = 0.3 * torch.randn(size, generator=generator)
                layer.running_var = 0.5 + torch.rand(size, generator=generator)
        made[name] = Net(name, model, torch.randn(48, *shape, generator=generator))
    return made


@pytest.fixture(params=sorted(_MODELS))
def net(request: pytest.FixtureRequest, nets: dict[str, Net]) -> Net:
    """Each model in turn."""
    return nets[str(request.param)]
