"""Whole small models compiled by TVM with our kernels, compared with torch in a child process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Linear

from planish.compilers import tvm_batch
from planish.compilers.cpu.sub_batch import SubBatch
from planish.compilers.verify import INT8_TOLERANCE
from planish.hwmodels.device import host
from planish.spaces import Candidate, Kind
from planish.spaces.apply import apply
from planish.spaces.bit_widths import PAIRS
from planish.spaces.propose import propose
from planish.spaces.quantize import deploy
from planish.spaces.trace import trace

pytestmark = pytest.mark.tvm

Compile = Callable[..., Any]
Shape = tuple[int, ...]
IMAGE, FEATURES = (1, 3, 9, 9), (1, 16, 6, 6)


class Net(nn.Module):
    """A forward pass given as a function of the net and its input, with the layers it uses."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Residual(nn.Module):
    """A residual block whose shortcut is the identity, a 1x1 convolution, or strided and filled with zeros ("A")."""

    def __init__(self, c: int, o: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.first, self.second = Conv2d(c, o, 3, stride, 1, bias=False), Conv2d(o, o, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _ in range(2))
        self.shortcut = nn.Sequential(Conv2d(c, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.kind, self.stride, self.extra = shortcut, stride, o - c

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        if self.kind == "conv":
            x = self.shortcut(x)
        elif self.kind == "A":
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(y + x)


class Inverted(nn.Module):
    """MobileNetV2's block, with a gate (squeeze and excite) where an activation for it is given."""

    def __init__(self, c: int, o: int, stride: int, activation: type[nn.Module], gate: nn.Module | None = None) -> None:
        super().__init__()
        wide = 3 * c
        self.up = nn.Sequential(Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), activation())
        deep = Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.deep = nn.Sequential(deep, nn.BatchNorm2d(wide), activation())
        self.squeeze, self.excite, self.gate = Conv2d(wide, 5, 1), Conv2d(5, wide, 1), gate
        self.down = nn.Sequential(Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o))
        self.same = stride == 1 and c == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.up(x))
        if self.gate is not None:
            y = y * self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        result: Tensor = self.down(y)
        return x + result if self.same else result


class Scaled(nn.Module):
    """A pooled convolution times a parameter: what no convolution takes into its weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.a, self.factor = wide(3, 16), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.a(x), 2) * self.factor


class Attention(nn.Module):
    """A transformer block: norm, two heads of attention, norm, two dense layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, 2 * width), nn.GELU(), Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, rows, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(n, rows, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.softmax(q @ k.transpose(-2, -1) / (width // 2) ** 0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, rows, width))
        result: Tensor = x + self.mlp(self.norms[1](x))
        return result


def classifier(*body: nn.Module, width: int, c: int = 3) -> nn.Module:
    stem = [Conv2d(3, c, 3, padding=1), nn.ReLU()] if c != 3 else []
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(width, 5))


def shuffled(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    n, c, h, w = y.shape
    y = y.reshape(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
    left, right = y.chunk(2, 1)
    result: Tensor = torch.cat([left, net.b(right)], 1)
    return result


def thrice(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    result: Tensor = net.b(y) + F.relu(y) * net.c(y) + y
    return result


def dense_block(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    for layer in (net.b, net.c):
        x = torch.cat([x, F.relu(layer(x))], 1)
    return x


def gated(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    result: Tensor = y * torch.sigmoid(net.b(y))
    return result


def wide(c: int, o: int, k: int = 3) -> Conv2d:
    return Conv2d(c, o, k, padding=k // 2)


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "residual blocks with identities": (
        lambda: classifier(Residual(16, 16, 1, ""), Residual(16, 16, 1, ""), width=16, c=16),
        (1, 3, 8, 8),
    ),
    "residual block with a convolution as shortcut": (
        lambda: classifier(Residual(16, 24, 2, "conv"), width=24, c=16),
        (1, 3, 8, 8),
    ),
    "residual block with zeros in its shortcut": (
        lambda: classifier(Residual(16, 24, 2, "A"), width=24, c=16),
        (1, 3, 8, 8),
    ),
    "concatenated blocks": (lambda: Net(dense_block, a=wide(3, 16), b=wide(16, 16), c=wide(32, 32)), IMAGE),
    "concatenated parts of blocks": (lambda: Net(dense_block, a=wide(3, 5), b=wide(5, 7), c=wide(12, 9)), IMAGE),
    "channel shuffle": (lambda: Net(shuffled, a=wide(3, 40), b=wide(20, 20)), IMAGE),
    "inverted block": (
        lambda: classifier(Inverted(8, 8, 1, nn.ReLU6), Inverted(8, 12, 2, nn.ReLU6), width=12, c=8),
        IMAGE,
    ),
    "gate of hardsigmoid": (lambda: Inverted(8, 8, 1, nn.Hardswish, nn.Hardsigmoid()), (1, 8, 5, 5)),
    "gate of sigmoid": (lambda: Inverted(8, 8, 2, nn.SiLU, nn.Sigmoid()), (1, 8, 5, 5)),
    "odd groups": (
        lambda: nn.Sequential(wide(3, 9), Conv2d(9, 15, 3, groups=3), nn.ReLU(), Conv2d(15, 30, 1, groups=15)),
        IMAGE,
    ),
    "groups of half a block": (lambda: nn.Sequential(wide(3, 32), Conv2d(32, 64, 3, 2, groups=4)), IMAGE),
    "convolution read three times": (lambda: Net(thrice, a=wide(3, 16), b=wide(16, 16, 1), c=wide(16, 16)), IMAGE),
    "convolution times itself": (lambda: Net(lambda net, x: (lambda y: y * y)(net.a(x)), a=wide(3, 16)), IMAGE),
    "convolution as output": (lambda: nn.Sequential(wide(3, 5)), IMAGE),
    "relu as output": (lambda: nn.Sequential(wide(3, 5), nn.ReLU()), IMAGE),
    "input as output": (lambda: nn.Identity(), (1, 5)),
    "dense layers": (
        lambda: nn.Sequential(Linear(13, 30), nn.ReLU(), Linear(30, 31), nn.Tanh(), Linear(31, 3)),
        (2, 13),
    ),
    "dense layer on images' rows": (lambda: nn.Sequential(Linear(6, 5), nn.Hardswish()), FEATURES),
    "transformer block": (lambda: Attention(16), (1, 5, 16)),
    "gate of the same shape": (lambda: Net(gated, a=wide(3, 16), b=wide(16, 16, 1)), IMAGE),
    # One channel times many: the blocked form has it in one lane, not in all.
    "gate of one channel": (lambda: Net(gated, a=wide(3, 20), b=wide(20, 1)), IMAGE),
    "average pool, hanging over": (
        lambda: nn.Sequential(wide(3, 8), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
        (1, 3, 8, 8),
    ),
    "average pool, hanging over a frame that counts": (
        lambda: nn.Sequential(wide(3, 8), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
        (1, 3, 8, 8),
    ),
    "maximum pool, hanging over": (
        lambda: nn.Sequential(wide(3, 8), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 2, 1, ceil_mode=True)),
        (1, 3, 8, 8),
    ),
    "average pool without its frame": (
        lambda: nn.Sequential(wide(3, 8), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        IMAGE,
    ),
    "adaptive pool to equal windows": (lambda: nn.Sequential(wide(3, 8), nn.AdaptiveAvgPool2d(3)), IMAGE),
    "adaptive pool to unequal windows": (lambda: nn.Sequential(wide(3, 8), nn.AdaptiveAvgPool2d((4, 2))), IMAGE),
    "mean with its axes kept": (
        lambda: Net(lambda net, x: net.b(net.a(x).mean((2, 3), keepdim=True)), a=wide(3, 16), b=wide(16, 4, 1)),
        IMAGE,
    ),
    "times a map of constants": (lambda: Scaled((1, 16, 4, 4)), (1, 3, 8, 8)),
    "times constants of the channels": (lambda: Scaled((16, 1, 1)), (1, 3, 8, 8)),
    "different across and down": (
        lambda: nn.Sequential(Conv2d(3, 8, (3, 2), (2, 1), (2, 1), (1, 2)), Conv2d(8, 5, (1, 3), (1, 2), (0, 1))),
        (1, 3, 9, 7),
    ),
    "mean over what is not blocked": (lambda: Net(lambda net, x: net.a(x.mean((2, 3))), a=Linear(3, 4)), IMAGE),
    "dropout": (lambda: nn.Sequential(wide(3, 8), nn.Dropout2d(), nn.Flatten(), nn.Dropout(), Linear(648, 2)), IMAGE),
    "input read twice": (
        lambda: Net(lambda net, x: net.a(x) - net.b(x) * x, a=wide(16, 16), b=wide(16, 16)),
        FEATURES,
    ),
    "constants on the left": (
        lambda: Net(lambda net, x: 1 - net.a(x) + 2 / (net.a(x) ** 2 + 1), a=wide(16, 5)),
        FEATURES,
    ),
    "constants on the right, bounded": (
        lambda: Net(lambda net, x: F.relu6((net.a(x) - 0.5) / 0.05) + F.hardtanh(net.a(x), -0.2, 0.3), a=wide(16, 5)),
        FEATURES,
    ),
    "one layer called twice": (lambda: Net(lambda net, x: net.a(F.relu(net.a(x))), a=wide(16, 16)), FEATURES),
    "activation in place": (lambda: Net(lambda net, x: F.hardswish(net.a(x), True) + 1, a=wide(3, 5)), IMAGE),
    "padding by name": (
        lambda: nn.Sequential(Conv2d(3, 8, 3, padding="same", dilation=2), Conv2d(8, 8, (2, 4), padding="same")),
        IMAGE,
    ),
    "frame of one side": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), Conv2d(3, 8, 3, 2)), IMAGE),
    "bounded on one side": (lambda: Net(lambda net, x: net.a(x).clamp(min=0.1), a=wide(3, 5)), IMAGE),
    "batch of three": (lambda: nn.Sequential(wide(3, 9), nn.MaxPool2d(3), nn.Flatten(), Linear(81, 4)), (3, 3, 9, 9)),
    "what has no kernel of ours": (
        lambda: nn.Sequential(wide(3, 8), nn.GroupNorm(2, 8), nn.ELU(), nn.ConvTranspose2d(8, 6, 2, 2), wide(6, 3)),
        IMAGE,
    ),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The net in eval mode, with batch norms that have seen something."""
    torch.manual_seed(0)
    model = make().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model


def quantised(model: nn.Module, shape: Shape, bits: int) -> nn.Module:
    """The model with every layer that may be quantised so, as it is deployed."""
    traced = trace(model, torch.randn(1, *shape[1:]))
    proposal = propose(traced, families=(Kind.BITS,))
    candidate = Candidate({choice.name: bits for choice in proposal.space.choices})
    return deploy(apply(candidate, traced, proposal, torch.randn(32, *shape[1:])))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NETS)
def test_a_compiled_model_computes_what_torch_computes(name: str, compile_model: Compile, difference: Compile) -> None:
    make, shape = NETS[name]
    artifact = compile_model(made(make), shape)
    assert difference(artifact) <= artifact.manifest.tolerance


QUANTISED = [
    "residual blocks with identities",
    "residual block with zeros in its shortcut",
    "inverted block",
    "gate of hardsigmoid",
    "odd groups",
    "convolution read three times",
    "different across and down",
    "dense layers",
    "transformer block",
]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_compiled_int8_model_computes_what_the_deployed_one_computes(
    name: str, compile_model: Compile, difference: Compile
) -> None:
    make, shape = NETS[name]
    shape = (1, *shape[1:])
    model = quantised(made(make), shape, bits=8)
    artifact = compile_model(model, shape, tolerance=INT8_TOLERANCE)
    assert any(kernel.startswith("q") for kernel, _ in artifact.manifest.kernels)
    assert difference(artifact) <= INT8_TOLERANCE


def test_four_bit_weights_run_on_the_int8_kernels(compile_model: Compile, difference: Compile) -> None:
    make, shape = NETS["inverted block"]
    artifact = compile_model(quantised(made(make), shape, bits=4), shape, tolerance=INT8_TOLERANCE)
    assert difference(artifact) <= INT8_TOLERANCE


def test_two_four_bit_weights_of_a_large_dense_layer_share_a_byte(compile_model: Compile, difference: Compile) -> None:
    from planish.compilers.tvm_build import cpu_machine
    from planish.compilers.tvm_workloads import plan

    # More bytes than the second level of cache holds, from an odd number of inputs to part of a block.
    model = quantised(nn.Sequential(nn.Linear(1021, 1101), nn.ReLU(), nn.Linear(1101, 5)).eval(), (1, 1021), bits=4)
    artifact = compile_model(model, (1, 1021), tolerance=INT8_TOLERANCE)
    assert difference(artifact) <= INT8_TOLERANCE
    found = plan(torch.export.export(model, (torch.zeros(1, 1021),)), host())
    large, small = (work for work in found.calls if work.macs)
    assert "nibbles=False" in small.form
    if cpu_machine(host()).dot_for(PAIRS[4]).data == "int16":
        pytest.skip("this CPU multiplies 16 bits: it takes every weight as a byte")
    assert large.weight_bytes < 0.6 * 1021 * 1101


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("bits", [None, 8])
def test_narrower_vectors_give_the_same_result(
    lanes: int, bits: int | None, compile_model: Compile, difference: Compile
) -> None:
    device = replace(host(), lanes=lanes, features=())
    make, shape = NETS["inverted block"]
    model = made(make) if bits is None else quantised(made(make), shape, bits)
    assert difference(compile_model(model, shape, device)) <= 1e-5


def test_two_threads_give_the_same_result(compile_model: Compile, difference: Compile) -> None:
    device = replace(host(), name="cpu?threads=2", threads=2)
    # Large enough that convolution, pool, dense layer and what has no kernel are worth a second thread.
    body = [wide(3, 64), nn.MaxPool2d(3, 2, 1), wide(64, 64), nn.GELU(), nn.Flatten(), Linear(64 * 576, 64)]
    artifact = compile_model(made(lambda: nn.Sequential(*body)), (1, 3, 48, 48), device, tolerance=1e-4)
    assert artifact.manifest.threads == 2
    assert difference(artifact, device) <= 1e-4  # sums of 36864 products


def test_kernels_are_named_with_the_layers_they_compute_in_order(compile_model: Compile) -> None:
    make, shape = NETS["residual block with a convolution as shortcut"]
    kernels = compile_model(made(make), shape).manifest.kernels
    sites = [site for _, site in kernels if site]
    assert sorted(sites) == sorted(["0", "2.first", "2.second", "2.shortcut.0", "5"])
    assert sites.index("2.first") < sites.index("2.second") < sites.index("5")


def test_the_peak_of_intermediate_values_is_reused_storage(compile_model: Compile) -> None:
    layers = [wide(16, 16) for _ in range(6)]
    peaks = [
        compile_model(nn.Sequential(*layers[:n]), (1, 16, 8, 8), name=str(n)).manifest.working_bytes for n in (3, 6)
    ]
    one = 4 * 16 * 8 * 8
    # A layer reads one value and writes another: a deeper chain needs no more.
    assert peaks[0] == peaks[1]
    assert 2 * one <= peaks[0] <= 3 * one


class Encoder(nn.Module):
    """A transformer's block: layer norms, attention, two layers with GELU between, shortcuts."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2)
        x = x + self.out(heads.reshape(n, tokens, width))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


@pytest.mark.parametrize("tokens", [1, 7, 17])
def test_a_transformers_block_runs_on_kernels_of_ours(
    compile_model: Compile, difference: Callable[..., float], tokens: int
) -> None:
    artifact = compile_model(Encoder().eval(), (2, tokens, 32))
    assert difference(artifact) <= artifact.manifest.tolerance
    names = [kernel.partition("_")[0] for kernel, _ in artifact.manifest.kernels]
    # The shortcuts and GELU are inside the dense kernels: nothing else is called.
    assert names == ["layer", "dense", "attention", "dense", "layer", "dense", "dense"]


@pytest.mark.parametrize("function", [torch.sigmoid, F.gelu, F.silu, torch.tanh])
def test_a_chain_of_exponentials_is_compiled_one_by_one(
    compile_model: Compile, difference: Callable[..., float], function: Callable[[Tensor], Tensor]
) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return function(function(function(net.a(x))))

    artifact = compile_model(Net(forward, a=wide(16, 16)).eval(), (1, 16, 5, 5))
    assert difference(artifact) <= artifact.manifest.tolerance


def test_convolutions_of_three_by_three_take_winograds_form(
    compile_model: Compile, difference: Callable[..., float]
) -> None:
    artifact = compile_model(nn.Conv2d(32, 32, 3, padding=1).eval(), (1, 32, 24, 24))
    assert artifact.manifest.kernels[0][0].startswith("winograd")
    assert difference(artifact) <= artifact.manifest.tolerance


SPLIT = [
    "residual blocks with identities",
    "residual block with zeros in its shortcut",
    "concatenated blocks",
    "concatenated parts of blocks",
    "inverted block",
    "gate of sigmoid",
    "gate of one channel",
    "mean with its axes kept",
    "one layer called twice",
    "different across and down",
    "times a map of constants",
    "what has no kernel of ours",
]


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the next models be split at a cut, given as a share of the way to the last, two images at a time."""

    def choose(share: float) -> None:
        def forced(layers: Any, cuts: set[int], batch: int, machine: Any) -> SubBatch | None:
            ordered = sorted(cuts)
            return SubBatch(ordered[round(share * (len(ordered) - 1))], 2) if ordered else None

        monkeypatch.setattr(tvm_batch, "sub_batch", forced)

    return choose


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("name", SPLIT)
def test_a_batch_in_parts_gives_the_same(
    name: str, share: float, cut_at: Callable[[float], None], compile_model: Compile, difference: Compile
) -> None:
    make, shape = NETS[name]
    cut_at(share)
    artifact = compile_model(made(make), (6, *shape[1:]))
    assert difference(artifact) <= artifact.manifest.tolerance
    assert max(Counter(kernel for kernel, _ in artifact.manifest.kernels).values()) >= 3


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("name", [*QUANTISED[:3], "odd groups"])
def test_an_int8_batch_in_parts_gives_the_same(
    name: str, share: float, cut_at: Callable[[float], None], compile_model: Compile, difference: Compile
) -> None:
    make, shape = NETS[name]
    model = quantised(made(make), (1, *shape[1:]), bits=8)
    cut_at(share)
    artifact = compile_model(model, (4, *shape[1:]), tolerance=INT8_TOLERANCE)
    assert difference(artifact) <= INT8_TOLERANCE
    assert max(Counter(kernel for kernel, _ in artifact.manifest.kernels).values()) >= 2


MIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean of all images": lambda net, x: net.a(x) - net.a(x).mean(0, keepdim=True),
    "mean of all": lambda net, x: net.a(x) * net.a(x).mean(),
    "turned round": lambda net, x: net.a(x) + net.a(x.flip(0)),
    "first image": lambda net, x: net.a(x) + net.a(x)[:1],
    "softmax along the batch": lambda net, x: net.a(x).softmax(0),
    "joined along the batch": lambda net, x: torch.cat([net.a(x), x[:, :1].expand(-1, 16, -1, -1)]),
    "another factor for every image": lambda net, x: net.a(x) * net.factors + net.a(x).relu(),
    "images in rows": lambda net, x: net.a(x).reshape(2, 2, 16, 9, 9).sum(1),
    "halves of the channels": lambda net, x: torch.cat([part.relu() for part in net.a(x).chunk(2, 1)], 1),
    "joined with constants": lambda net, x: torch.cat([net.a(x), net.factors.expand(-1, 2, 9, 9)], 1).relu(),
    "images along the width": lambda net, x: net.a(x)[..., :4].relu() + net.a(x).mean((1, 2, 3)),
    "images as weights": lambda net, x: F.conv2d(net.a(x), net.a(x)[:, :, :3, :3]),
    "images as channels": lambda net, x: net.a(x).transpose(0, 1).relu(),
    "framed by images": lambda net, x: F.pad(net.a(x), (0, 0, 0, 0, 0, 0, 1, 0)).relu(),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_images_is_in_no_part(
    name: str, cut_at: Callable[[float], None], compile_model: Compile, difference: Compile
) -> None:
    model = made(lambda: Net(MIXED[name], a=wide(3, 16)))
    model.register_buffer("factors", torch.randn(4, 1, 1, 1))
    cut_at(1.0)
    artifact = compile_model(model, (4, 3, 9, 9))
    assert difference(artifact) <= artifact.manifest.tolerance
