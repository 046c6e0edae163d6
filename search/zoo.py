"""The built-in architectures: small enough to search on a laptop, real enough to have trade-offs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus a shortcut, then relu; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, ceil(h / stride), ceil(w / stride))."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for one-channel images of about 32x32: a stem of stride 2 and three stages.

    Widths are multiples of 16 so that channel pruning aligned to 16 lanes has steps to choose from.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages = []
        before = widths[0]
        for index, width in enumerate(widths):
            strides = [1 if index == 0 else 2] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(
                    *(ResidualBlock(before if i == 0 else width, width, stride) for i, stride in enumerate(strides))
                )
            )
            before = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, h, w) to logits (n, classes)."""
        x = functional.relu(self.bn(self.stem(x)))
        return self.fc(self.stages(x).mean((2, 3)))  # type: ignore[no-any-return]


class CifarBlock(nn.Module):
    """A basic block whose shortcut has no parameters: every second pixel, missing channels zero (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(inner + x)


class CifarResNet(nn.Module):
    """The CIFAR form of ResNet, depth 6n+2 with n blocks in each of three stages.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2. The names of the
    parameters are those of the published checkpoints.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth {depth} is not 6n+2; use 20, 32, 44, 56 or 110")
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _cifar_stage(16, 16, n, 1)
        self.layer2 = _cifar_stage(16, 32, n, 2)
        self.layer3 = _cifar_stage(32, 64, n, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to logits (n, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and relu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w), same shape out."""
        x = functional.relu(self.bn1(self.dw(x)))
        return functional.relu(self.bn2(self.pw(x)))


class Stem(nn.Module):
    """The first convolution of DS-CNN; its padding is TensorFlow's "same", which is not symmetric."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, (10, 4), 2)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 49, 10) to (n, channels, 25, 5)."""
        return functional.relu(self.bn(self.conv(functional.pad(x, (1, 1, 4, 5)))))


class DsCnn(nn.Module):
    """The depthwise-separable keyword-spotting network of MLPerf Tiny.

    Source: Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017; the widths and the
    names are those of the benchmark's reference model.
    """

    def __init__(self, channels: int = 64, blocks: int = 4, classes: int = 12) -> None:
        super().__init__()
        self.stem = Stem(channels)
        self.blocks = nn.Sequential(*(SeparableBlock(channels) for _ in range(blocks)))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """MFCC features (n, 1, 49, 10) to logits (n, classes)."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def digits_resnet() -> nn.Module:
    """26 M MACs on 1x32x32, untrained."""
    return SmallResNet()


def fashion_resnet() -> nn.Module:
    """The same network for 1x28x28, untrained."""
    return SmallResNet()


def cifar10_resnet20() -> nn.Module:
    """41 M MACs on 3x32x32, untrained."""
    return CifarResNet(20)


def cifar10_resnet56() -> nn.Module:
    """126 M MACs on 3x32x32, untrained."""
    return CifarResNet(56)


def kws_dscnn() -> nn.Module:
    """2.7 M MACs on 1x49x10, untrained."""
    return DsCnn()


def _cifar_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
