from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.search.distill_layout import channels_last, contiguous

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    """Ends its images with `view`, or with `flatten`."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        result: Tensor = self.last(y.view(len(y), -1) if self.view else y.flatten(1))
        return result


def test_images_are_laid_out_with_channels_last_and_back() -> None:
    network = Flat(view=False).train()
    before, weight = network(IMAGES), network.conv.weight.detach().clone()
    channels_last(network, IMAGES)
    assert network.training
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(IMAGES), before)
    contiguous(network)
    assert network.conv.weight.is_contiguous()
    assert torch.equal(network.conv.weight, weight)


def test_a_network_that_looks_at_its_memory_stays_as_it_is() -> None:
    network = Flat(view=True)
    channels_last(network, IMAGES)
    assert network.conv.weight.is_contiguous()
    network(IMAGES).sum().backward()


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 9), (2, 3, 4, 4, 4)])
def test_what_is_no_image_stays_as_it_is(shape: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    example = torch.zeros(shape)
    network(example)
    channels_last(network, example)
    assert network(example).shape == (2, 2)
