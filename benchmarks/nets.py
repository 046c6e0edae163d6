"""The networks that are compiled and timed, with random weights and batch norm statistics unless they are built in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.search.zoo import CifarResNet, DsCnn, ResidualBlock, SmallResNet


@dataclass(frozen=True)
class Net:
    """A network: how it is made, and the shape of one sample."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class Vgg16(nn.Module):
    """VGG-16 for 3x32x32 with batch norm; Simonyan and Zisserman 2014, the CIFAR form with one hidden layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, classes)."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)]
        layers += [nn.BatchNorm2d(hidden), nn.ReLU6(), nn.Conv2d(hidden, outputs, 1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        inner: Tensor = self.layers(x)
        return x + inner if self.shortcut else inner


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2; `first` is the stride of the first convolution (1 for images of 32x32)."""

    def __init__(self, first: int = 2, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, first, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        before = 32
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, width, count, stride in table:
            for position in range(count):
                layers.append(InvertedResidual(before, width, stride if position == 0 else 1, expansion))
                before = width
        layers += [nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, classes)."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class ResNet18(nn.Module):
    """He et al. 2015, table 1, for 3x224x224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        before = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [ResidualBlock(before, width, stride), ResidualBlock(width, width, 1)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, classes)."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Reduce 1x1, 3x3, expand 1x1; the stride is in the 3x3, as torchvision has it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, 4 width, h / stride, w / stride)."""
        return functional.relu(self.layers(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """He et al. 2015, table 1, for 3x224x224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        blocks: list[nn.Module] = []
        before = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for position in range(count):
                blocks.append(Bottleneck(before, width, stride if position == 0 else 1))
                before = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, classes)."""
        x = functional.max_pool2d(self.stem(x), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class MBConv(nn.Module):
    """Expand, depthwise, squeeze and excite, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden, squeezed = inputs * expansion, max(1, inputs // 4)
        self.shortcut = stride == 1 and inputs == outputs
        spread: list[nn.Module] = []
        if expansion > 1:
            spread += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()]
        spread += [nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)]
        self.spread = nn.Sequential(*spread, nn.BatchNorm2d(hidden), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(hidden, squeezed, 1), nn.Conv2d(squeezed, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        inner: Tensor = self.spread(x)
        mean = inner.mean((2, 3), keepdim=True)
        inner = inner * torch.sigmoid(self.excite(functional.silu(self.squeeze(mean))))
        inner = self.project(inner)
        return x + inner if self.shortcut else inner


class EfficientNetB0(nn.Module):
    """Tan and Le 2019, table 1, for 3x224x224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
        before = 32
        table = (
            (1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3),
            (6, 112, 5, 1, 3), (6, 192, 5, 2, 4), (6, 320, 3, 1, 1),
        )  # fmt: skip
        for expansion, width, kernel, stride, count in table:
            for position in range(count):
                layers.append(MBConv(before, width, kernel, stride if position == 0 else 1, expansion))
                before = width
        layers += [nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, classes)."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width), shape kept."""
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.project(heads.transpose(1, 2).reshape(n, tokens, width))
        return x + self.contract(functional.gelu(self.expand(self.norm2(x))))  # type: ignore[no-any-return]


class ViTTiny(nn.Module):
    """Touvron et al. 2021 (DeiT-Ti): 12 layers, width 192, 3 heads, patches of 16x16 of 3x224x224."""

    def __init__(self, classes: int = 1000, width: int = 192) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, 3) for _ in range(12)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])  # type: ignore[no-any-return]


def _mlp() -> nn.Module:
    """Dense layers whose 29 million weights no cache holds: what they take is reading them."""
    widths = (1024, 4096, 4096, 2048, 10)
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


NETS: Mapping[str, Net] = {
    "digits-resnet": Net(SmallResNet, (1, 32, 32)),
    "resnet20": Net(lambda: CifarResNet(20), (3, 32, 32)),
    "resnet56": Net(lambda: CifarResNet(56), (3, 32, 32)),
    "vgg16": Net(Vgg16, (3, 32, 32)),
    "mobilenetv2-32": Net(lambda: MobileNetV2(first=1), (3, 32, 32)),
    "dscnn": Net(DsCnn, (1, 49, 10)),
    "mobilenetv2": Net(MobileNetV2, (3, 224, 224)),
    "resnet18": Net(ResNet18, (3, 224, 224)),
    "resnet50": Net(ResNet50, (3, 224, 224)),
    "efficientnet-b0": Net(EfficientNetB0, (3, 224, 224)),
    "vit-tiny": Net(ViTTiny, (3, 224, 224)),
    "mlp": Net(_mlp, (1024,)),
}


def make(name: str) -> nn.Module:
    """The network in eval mode, random from seed 0; batch norms get statistics, because fresh ones are trivial."""
    torch.manual_seed(0)
    module = NETS[name].make()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module.eval()
