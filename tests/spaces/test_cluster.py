"""Shared weights: few values, the nearest ones, and gradients that add up."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planish.spaces.cluster import SharedConv2d, index_bits, kmeans, materialise, share, weight_of, worth_sharing

LAYERS: list[nn.Conv2d | nn.Linear] = [
    nn.Conv2d(8, 16, 3, 2, 1),
    nn.Conv2d(16, 16, (3, 5), groups=16, dilation=2, bias=False),
    nn.Linear(40, 30),
]


@pytest.mark.parametrize("entries", [4, 16, 64])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_shared_layer_computes_with_at_most_k_values_the_nearest_to_its_own(
    layer: nn.Conv2d | nn.Linear, entries: int
) -> None:
    shared = share(layer, entries)
    weight = weight_of(shared).detach()
    assert len(set(weight.flatten().tolist())) <= entries
    codebook = shared.shared.codebook.detach()
    distance = (layer.weight.detach()[..., None] - codebook).abs()
    assert torch.allclose((layer.weight.detach() - weight).abs(), distance.amin(-1), atol=1e-7)
    x = torch.randn(2, 40) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 12, 12)
    plain = copy.deepcopy(layer)
    plain.weight.data = weight
    assert torch.equal(shared(x), plain(x))
    assert torch.equal(materialise(shared)(x), plain(x))


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60), st.integers(2, 8))
def test_centres_are_the_means_of_what_is_nearest_to_them(numbers: list[float], entries: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    centres = kmeans(values, entries)
    assert len(centres) == entries
    assert torch.equal(centres, centres.sort().values)
    nearest = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)
    for index in set(nearest.tolist()):
        assert torch.allclose(values[nearest == index].mean(), centres[index], atol=1e-9)


@given(
    st.lists(st.tuples(st.floats(-4, 4, width=16), st.floats(0, 8, width=16)), min_size=2, max_size=40),
    st.integers(2, 6),
)
def test_weighted_centres_are_the_weighted_means_of_what_is_nearest(
    pairs: list[tuple[float, float]], entries: int
) -> None:
    values, counts = (torch.tensor(part, dtype=torch.float64) for part in zip(*pairs, strict=True))
    centres = kmeans(values, entries, counts)
    counts = counts / counts.mean().clamp_min(1e-30) + 1e-6  # nothing is quite without importance
    nearest = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)
    for index in set(nearest.tolist()):
        own = nearest == index
        assert torch.allclose((values[own] * counts[own]).sum() / counts[own].sum(), centres[index], atol=1e-6)


def test_what_counts_more_is_nearer_to_a_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, generator=generator)
    # The wide ones count: centres go where they are.
    counts = torch.where(values.abs() > 1.5, 50.0, 1.0)

    def error(centres: torch.Tensor) -> float:
        return float((counts * (values[:, None] - centres).square().amin(1)).sum())

    assert error(kmeans(values, 8, counts)) < 0.8 * error(kmeans(values, 8))


def test_a_layer_is_shared_by_what_its_weights_multiply() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        layer.weight[:, :4] *= 3
    variances = torch.where(torch.arange(16) < 4, 10.0, 0.1)[None, :, None, None]

    def error(shared: nn.Module) -> float:
        assert isinstance(shared, SharedConv2d)
        return float((variances * (weight_of(shared) - layer.weight).detach().square()).sum())

    assert error(share(layer, 8, importance=variances)) < 0.9 * error(share(layer, 8))


def best_error(values: list[float], entries: int) -> float:
    """The least squared error of any partition, by dynamic programming over the sorted values."""
    ordered = sorted(values)

    def spread(first: int, last: int) -> float:
        part = ordered[first:last]
        mean = sum(part) / len(part)
        return sum((v - mean) ** 2 for v in part)

    row = [0.0, *[spread(0, last) for last in range(1, len(ordered) + 1)]]
    for _ in range(entries - 1):
        row = [0.0, *[min([row[c] + spread(c, n) for c in range(n)]) for n in range(1, len(ordered) + 1)]]
    return row[-1]


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_within_a_fifth_of_the_best_partition(seed: int) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centres = kmeans(values, 8)
    error = float((values[:, None] - centres).square().amin(1).sum())
    assert error <= 1.2 * best_error(values.tolist(), 8) + 1e-12


def test_the_codebooks_shape_does_not_depend_on_the_weights() -> None:
    layer = nn.Linear(40, 30)
    nn.init.constant_(layer.weight, 0.5)
    shared = share(layer, 16)
    assert shared.shared.codebook.shape == (16,)
    assert shared.shared.indices.dtype == torch.uint8
    assert torch.equal(weight_of(shared), torch.full((30, 40), 0.5))


def test_a_codebook_entrys_gradient_is_the_mean_over_its_weights() -> None:
    """One step of the codebook is the projection of the plain weights' step onto weights that are shared."""
    layer = nn.Conv2d(4, 8, 3)
    shared = share(layer, 8)
    assert isinstance(shared, SharedConv2d)
    plain = materialise(shared)
    x = torch.randn(2, 4, 6, 6)
    shared(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert plain.weight.grad is not None
    assert shared.shared.codebook.grad is not None
    for entry in range(8):
        expected = plain.weight.grad[shared.shared.indices == entry].mean()
        assert torch.allclose(shared.shared.codebook.grad[entry], expected, rtol=1e-4, atol=1e-4)


def test_sharing_is_deterministic() -> None:
    layer = nn.Linear(64, 64)
    first, second = share(layer, 64).state_dict(), share(layer, 64).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_index_has_the_bits_to_name_every_entry() -> None:
    assert [index_bits(k) for k in (1, 2, 3, 4, 16, 17, 64, 256)] == [1, 1, 2, 2, 4, 5, 6, 8]


def test_sharing_is_worth_it_only_if_indices_and_codebook_are_smaller() -> None:
    assert worth_sharing(342, 256)  # 342 * 8 + 8192 = 10928 < 342 * 32 = 10944
    assert not worth_sharing(341, 256)
