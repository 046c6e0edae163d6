"""Stored bytes against an independent count from the deployed weights, and MACs against the definition."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.spaces.apply import apply
from planish.spaces.cluster import SharedConv2d, SharedLinear, share
from planish.spaces.integer import IntegerConv2d, IntegerLinear
from planish.spaces.quantize import Quantized, Range, deploy
from planish.spaces.size import count_macs, entropy_coded_bytes, huffman_bytes, stored_bytes

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


@pytest.mark.parametrize("seed", [0, 1])
def test_stored_bytes_are_the_bits_of_all_weights_and_constants(net: Net, seed: int) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(seed))
    module = apply(candidate, net.traced, net.proposal, net.calibration)
    deployed = deploy(module)
    total = 0
    for name, layer in deployed.named_modules():
        source = module.get_submodule(name)
        inner = source.inner if isinstance(source, Quantized) else source
        book = math.inf
        if isinstance(inner, SharedConv2d | SharedLinear):
            entries = len(inner.shared.codebook)
            book = 4 * entries + math.ceil(inner.shared.indices.numel() * math.log2(entries) / 8)
        if isinstance(layer, IntegerConv2d | IntegerLinear):
            assert isinstance(source, Quantized)
            packed = math.ceil(layer.weight.numel() * source.bits / 8)
            total += int(min(packed, book)) + 4 * len(layer.scale) + 4 + 1
            total += 4 * len(layer.bias) if inner.bias is not None else 0
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.weight is not None
            total += int(min(4 * layer.weight.numel(), book))
            total += 0 if layer.bias is None else 4 * len(layer.bias)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            total += 4 * 4 * layer.num_features
    assert stored_bytes(module) == total


def test_sizes_of_one_layer_by_hand() -> None:
    linear = nn.Linear(100, 30)
    assert stored_bytes(linear) == 4 * (3000 + 30)
    tied = nn.Linear(100, 30)
    tied.weight = linear.weight
    assert stored_bytes(nn.Sequential(linear, tied)) == 4 * (3000 + 30 + 30)
    assert stored_bytes(share(linear, 16)) == 4 * 16 + 1500 + 4 * 30
    assert stored_bytes(Quantized(linear, 8, Range(0, 1))) == 3000 + 4 * 30 + 5 + 4 * 30
    assert stored_bytes(Quantized(linear, 4, Range(0, 1))) == 1500 + 4 * 30 + 5 + 4 * 30
    assert stored_bytes(Quantized(share(linear, 16), 8, Range(0, 1))) == 64 + 1500 + 4 * 30 + 5 + 4 * 30
    assert stored_bytes(Quantized(share(linear, 64), 4, Range(0, 1))) == 1500 + 4 * 30 + 5 + 4 * 30
    assert stored_bytes(nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3))) == 4 * 81 + 4 * 12


def test_odd_counts_of_bits_are_rounded_up_to_bytes() -> None:
    assert stored_bytes(Quantized(nn.Linear(3, 1, bias=False), 4, Range(0, 1))) == 2 + 4 + 5


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1), (4, 9, 9), 5 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), (4, 9, 9), 7 * 7 * 8 * 9),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
    ],
)
def test_macs_are_counted_alike_before_and_after_quantisation(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], macs: int
) -> None:
    x = torch.randn(1, *shape)
    quantised = nn.Sequential(Quantized(layer, 8, Range(-1, 1)))
    assert count_macs(layer, x) == count_macs(quantised, x) == count_macs(deploy(quantised), x) == macs


def test_counting_leaves_the_mode_of_every_part_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[0].eval()
    count_macs(model, torch.randn(1, 4))
    assert [part.training for part in model] == [False, True]


def test_attention_is_counted_by_its_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_macs(Attention(), torch.randn(1, 2, 5, 8)) == 2 * (2 * 5 * 5 * 8)


def test_a_huffman_code_is_as_short_as_one_can_be_by_hand() -> None:
    # 8 of one symbol, 4, 2, 1 and 1 of others: lengths 1, 2, 3, 4, 4 and so 8 + 8 + 6 + 8 bits, in 4 bytes; a table of
    # the five symbols from -2 to 2, and their range.
    symbols = torch.tensor([0] * 8 + [1] * 4 + [-1] * 2 + [2, -2], dtype=torch.int8)
    assert huffman_bytes(symbols[torch.randperm(16)]) == 4 + 5 + 2
    assert huffman_bytes(torch.full((17,), 3, dtype=torch.uint8)) == 3 + 1 + 2
    # No prefix code is shorter than the entropy, and Huffman's by less than a bit a symbol longer.
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(0)).mul(20).round().clamp(-127, 127)
    shares = torch.unique(drawn, return_counts=True)[1].double() / len(drawn)
    entropy = float(-(shares * shares.log2()).sum()) * len(drawn) / 8
    table = int(drawn.max() - drawn.min()) + 1 + 2
    assert entropy <= huffman_bytes(drawn.to(torch.int8)) - table < entropy + len(drawn) / 8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coding_never_takes_more_and_is_of_the_weights_that_are_deployed(net: Net, seed: int) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(seed))
    module = apply(candidate, net.traced, net.proposal, net.calibration)
    saved = stored_bytes(module) - entropy_coded_bytes(module)
    assert saved >= 0
    plain, deployed, expected = {}, deploy(module), 0
    for name, layer in module.named_modules():
        inner = layer.inner if isinstance(layer, Quantized) else layer
        shared = isinstance(inner, SharedConv2d | SharedLinear)
        ways = []
        if isinstance(layer, Quantized):
            weight = deployed.get_submodule(name).get_buffer("weight")
            ways.append((math.ceil(weight.numel() * layer.bits / 8), huffman_bytes(weight)))
            plain[f"{name}.inner"] = True
        if shared and name not in plain:
            assert isinstance(inner, SharedConv2d | SharedLinear)
            indices, entries = inner.shared.indices, len(inner.shared.codebook)
            packed = math.ceil(indices.numel() * math.ceil(math.log2(entries)) / 8)
            ways.append((packed + 4 * entries, huffman_bytes(indices) + 4 * entries))
        if ways:
            expected += min(way[0] for way in ways) - min(min(way) for way in ways)
    assert saved == expected
