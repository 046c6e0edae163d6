"""What a compiled model of bytes may differ by from torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.compilers.verify import tolerance_of


class Steps(nn.Module):
    """Rounds to so many steps of one, and makes outputs of them beside a one; `at` is where between two it lies."""

    def __init__(self, at: float, size: float) -> None:
        super().__init__()
        self.at, self.size = at, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), self.size * torch.round(x + self.at - 0.5)], 1)


def tolerance(at: float, size: float, values: Tensor) -> float:
    program = torch.export.export(Steps(at, size), (values[:1],))
    return tolerance_of(program, values[:, None], 0.05)


VALUES = torch.full((4, 3), 1.0)


def test_nothing_moves_where_nothing_lies_between_two_steps() -> None:
    assert tolerance(0.2, 0.1, VALUES) == 0.05


@pytest.mark.parametrize(("size", "wanted"), [(0.01, 0.05), (0.1, 0.2), (0.8, 0.25)])
def test_a_value_between_two_steps_may_go_either_way(size: float, wanted: float) -> None:
    # 1 and a little more or less is rounded to 0 or 1 of so many: relative to the largest output, which is the one.
    assert tolerance(0.0, size, VALUES) == pytest.approx(wanted, rel=1e-3)


def test_whole_numbers_are_not_moved() -> None:
    program = torch.export.export(nn.Embedding(9, 4), (torch.tensor([[1, 2]]),))
    assert tolerance_of(program, torch.tensor([[[1, 2]]]), 0.05) == 0.05
