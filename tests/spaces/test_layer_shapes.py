"""The shapes of what would stand at a site, against what `apply` puts there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from planish.spaces.apply import skeleton
from planish.spaces.cluster import SharedConv2d, SharedLinear
from planish.spaces.layer_shapes import LayerShape, layers_at, shape_of
from planish.spaces.propose import Proposal, propose
from planish.spaces.quantize import Quantized
from planish.spaces.size import count_macs, stored_bytes
from planish.spaces.space import Candidate, Kind
from planish.spaces.trace import TracedModel, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.square = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(16, 24, 5, padding=2)
        self.fc = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.wide(torch.relu(x + self.square(x))))
        y: torch.Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def net() -> tuple[TracedModel, Proposal]:
    torch.manual_seed(0)
    traced = trace(Net(), torch.randn(1, 8, 8, 6))
    return traced, propose(traced, lanes=4)


def real_layers(module: nn.Module, site: str) -> list[tuple[object, ...]]:
    found: list[tuple[nn.Module, tuple[object, ...], tuple[int, int], int, bool]] = []
    for layer in module.get_submodule(site).modules():
        if isinstance(layer, Quantized):
            inner, bits = layer.inner, (8, layer.bits)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            inner, bits = layer, (32, 32)
        else:
            continue
        entries = len(inner.shared.codebook) if isinstance(inner, SharedConv2d | SharedLinear) else 0
        if isinstance(inner, nn.Linear):
            found.append(
                (inner, ("linear", inner.in_features, inner.out_features), bits, entries, inner.bias is not None)
            )
        else:
            key = (inner.in_channels, inner.out_channels, inner.kernel_size, inner.stride, inner.padding, inner.groups)
            found.append((inner, ("conv2d", *key), bits, entries, inner.bias is not None))
    seen: set[int] = set()
    return [
        (key, *bits, entries, bias)
        for inner, key, bits, entries, bias in sorted(
            found, key=lambda f: f[2][0]
        )  # the quantised view of a layer first
        if not (id(inner) in seen or seen.add(id(inner)))  # type: ignore[func-returns-value]
    ]


def told(shape: LayerShape) -> tuple[object, ...]:
    key: tuple[object, ...] = (shape.op, shape.inputs, shape.outputs)
    if shape.op == "conv2d":
        key = (*key, shape.kernel, shape.stride, shape.padding, shape.groups)
    return key, shape.bits, shape.stored_bits, shape.entries, shape.bias


def test_shapes_are_those_of_the_layers_that_apply_puts_there(net: tuple[TracedModel, Proposal]) -> None:
    traced, proposal = net
    space = proposal.space
    rng = np.random.default_rng(0)
    extents = {layer.name: layer for layer in traced.layers}
    for _ in range(20):
        # BLOCK, RANK, CLUSTER and BITS in any combination; widths are the group's, which `apply` sets.
        candidate = space.sample(rng)
        module = skeleton(candidate, traced, proposal)
        pruned = skeleton(
            Candidate({n: o if n.endswith(":prune") else None for n, o in candidate.options.items()}), traced, proposal
        )
        macs = size = plain = 0
        for site in ("first", "square", "wide", "fc"):
            layer = pruned.get_submodule(site)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            reads = extents[site].in_shape[1:] if isinstance(layer, nn.Conv2d) else (1, 1)
            options = {kind: candidate.options.get(f"{site}:{kind.value}") for kind in Kind}
            own = shape_of(layer, (reads[0], reads[1]))
            got = layers_at(own, options, 4, same_channels=site == "square")
            assert sorted(map(told, got), key=str) == sorted(real_layers(module, site), key=str), (site, options)
            macs += sum(shape.macs for shape in got)
            size += sum(shape.stored_bytes for shape in got)
            plain += own.stored_bytes
        assert macs == count_macs(module, traced.example)
        assert size - plain == stored_bytes(module) - stored_bytes(pruned)
