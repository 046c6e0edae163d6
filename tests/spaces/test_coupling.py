"""Coupled channel groups against the definition: the original with the same channels read as zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces.coupling import Coupling, couple
from planish.spaces.prune import Group, narrow
from planish.spaces.trace import trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


def masked_output(model: nn.Module, groups: list[tuple[Group, Tensor]], x: Tensor) -> Tensor:
    """What the model computes if its layers read zeros instead of the channels that each group does not keep."""
    positions: dict[str, list[int]] = {}
    for group, keep in groups:
        for member in group.members:
            if member.role == "in":
                gone = set(range(group.width)) - set(keep.tolist())
                positions.setdefault(member.name, []).extend(p for c in gone for p in member.indices[c])
    masked = copy.deepcopy(model)
    for name, zeros in positions.items():

        def mask(_: nn.Module, inputs: tuple[Tensor, ...], zeros: list[int] = zeros) -> Tensor:
            values = inputs[0].clone()
            values[:, zeros] = 0
            return values

        masked.get_submodule(name).register_forward_pre_hook(mask)
    with torch.no_grad():
        out: Tensor = masked(x)
    return out


def members(coupling: Coupling, site: str) -> dict[str, str]:
    group = next(group for group in coupling.groups if group.site == site)
    return {member.name: member.role for member in group.members}


@pytest.mark.parametrize("keep_every", [2, 3])
def test_a_pruned_group_equals_the_masked_original(net: Net, keep_every: int) -> None:
    for group in couple(net.traced).groups:
        keep = torch.arange(0, group.width, keep_every)
        smaller = copy.deepcopy(net.model)
        narrow(smaller, [(group, keep)], {})
        with torch.no_grad():
            got = smaller(net.calibration[:4])
        want = masked_output(net.model, [(group, keep)], net.calibration[:4])
        assert torch.allclose(got, want, atol=1e-4), group.site  # float32 sums in another order
        assert not torch.allclose(got, net.model(net.calibration[:4]), atol=1e-4), group.site


def test_all_groups_together_equal_the_masked_original(net: Net) -> None:
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for group in couple(net.traced).groups:
        keep = torch.randperm(group.width, generator=generator)[: group.width // 2].sort().values
        pairs.append((group, keep))
    smaller = copy.deepcopy(net.model)
    narrow(smaller, pairs, {})
    with torch.no_grad():
        got = smaller(net.calibration[:4])
    assert torch.allclose(got, masked_output(net.model, pairs, net.calibration[:4]), atol=1e-4)


def test_a_residual_sum_couples_both_branches_and_is_named_after_the_first_layer(nets: dict[str, Net]) -> None:
    assert members(couple(nets["resnet"].traced), "layer3.0.conv2") == {
        "layer3.0.conv2": "out",
        "layer3.0.bn2": "both",
        "layer3.0.shortcut.0": "out",
        "layer3.0.shortcut.1": "both",
        "linear": "in",
    }


def test_a_depthwise_convolution_goes_with_what_feeds_it(nets: dict[str, Net]) -> None:
    found = members(couple(nets["mobile"].traced), "expand.0")
    assert found == {
        "expand.0": "out",
        "expand.1": "both",
        "depthwise.0": "both",
        "depthwise.1": "both",
        "project.0": "in",
    }


def test_a_concatenation_shifts_the_positions_of_its_second_part(nets: dict[str, Net]) -> None:
    groups = {group.site: group for group in couple(nets["mobile"].traced).groups}
    head = {site: next(m for m in groups[site].members if m.name == "head") for site in ("left", "right")}
    assert head["left"].indices == tuple((c,) for c in range(32))
    assert head["right"].indices == tuple((32 + c,) for c in range(48))


def test_a_flatten_gives_each_channel_all_its_pixels(nets: dict[str, Net]) -> None:
    group = next(group for group in couple(nets["mobile"].traced).groups if group.site == "head")
    linear = next(member for member in group.members if member.name == "fc1")
    assert linear.indices == tuple(tuple(range(4 * c, 4 * c + 4)) for c in range(64))


def test_padded_shortcuts_are_refused_with_the_operation_named(nets: dict[str, Net]) -> None:
    coupling = couple(nets["resnet20"].traced)
    assert {group.site for group in coupling.groups} == {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)}
    assert "F.pad and a slice" in coupling.refused["conv1"]
    assert "F.pad" in coupling.refused["layer3.2.conv2"]
    assert all("\n" not in reason for reason in coupling.refused.values())


class Awkward(nn.Module):
    """A convolution whose channels go where `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32) if how == "group norm" else nn.Identity()
        self.second = nn.Conv2d(32, 32, 3, padding=1, groups=4 if how == "groups" else 1)
        self.scale = nn.Parameter(torch.full((32, 1, 1), 1e-6))
        self.last = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.how == "view":
            y = y.view(-1, 4, 8, *y.shape[2:]).transpose(1, 2).reshape(-1, 32, *y.shape[2:])
        if self.how == "softmax":
            y = torch.softmax(y, 1)
        if self.how == "mean":
            y = y - y.mean(1, keepdim=True)
        if self.how == "scale":
            y = y * self.scale
        z: Tensor = self.last(F.relu(self.second(y)))
        return z


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("view", "removing half of them fails"),
        ("softmax", "does not equal setting them to zero"),
        ("mean", "does not equal setting them to zero"),
        ("groups", "second is a grouped convolution"),
        ("group norm", "go into norm, a GroupNorm"),
    ],
)
def test_channels_that_mean_something_beyond_themselves_are_refused(how: str, reason: str) -> None:
    coupling = couple(trace(Awkward(how), torch.randn(1, 3, 6, 6)))
    assert "first" not in {group.site for group in coupling.groups}
    assert reason in coupling.refused["first"]
    assert coupling.refused["last"]  # the model's output


def test_a_parameter_that_scales_channels_is_narrowed_with_them_even_if_it_is_nearly_zero() -> None:
    coupling = couple(trace(Awkward("scale"), torch.randn(1, 3, 6, 6)))
    assert members(coupling, "first")["scale"] == "parameter"


def test_norms_that_start_at_zero_hide_no_group(nets: dict[str, Net]) -> None:
    model = copy.deepcopy(nets["resnet"].model)
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.get_parameter("weight"))
    assert couple(trace(model, nets["resnet"].example)).groups == couple(nets["resnet"].traced).groups


@pytest.mark.parametrize(
    ("first", "example"),
    [
        (lambda x: nn.functional.one_hot(x.long(), 7).float(), torch.arange(7.0).repeat(3)[None]),
        (lambda x: torch.log(x)[..., None].expand(-1, -1, 7), torch.linspace(0.5, 3.0, 21)[None]),
    ],
    ids=["tokens", "above zero"],
)
def test_models_are_probed_with_inputs_that_they_take(
    first: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(7, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(torch.relu(self.up(first(x)))).mean(1)
            return out

    torch.manual_seed(0)
    coupling = couple(trace(Network().eval(), example))
    assert [group.width for group in coupling.groups] == [32]
