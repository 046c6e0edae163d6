"""Layers of bfloat16, against the definition; and where they are an option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces import Candidate, Kind
from planish.spaces.apply import apply, rebuild, skeleton, state
from planish.spaces.bfloat16 import Bfloat16
from planish.spaces.bfloat16_ops import Bfloat16Conv2d, Bfloat16Linear
from planish.spaces.cluster import share
from planish.spaces.layer_shapes import layers_at, shape_of
from planish.spaces.local_error import local_errors
from planish.spaces.propose import Proposal, propose
from planish.spaces.quantize import deploy
from planish.spaces.size import count_macs, entropy_coded_bytes, stored_bytes
from planish.spaces.trace import TracedModel, trace


def conv(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_and_weights_are_rounded_and_sums_are_not(bias: bool) -> None:
    layer, x = conv(bias), torch.randn(4, 6, 11, 9)
    rounded = Bfloat16(layer).eval()
    offset = None if layer.bias is None else layer.bias.double()
    want = F.conv2d(
        x.bfloat16().double(), layer.weight.bfloat16().double(), offset, layer.stride, layer.padding, layer.dilation,
        layer.groups,
    )  # fmt: skip
    got = rounded(x)
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-5)
    assert not torch.equal(got, got.bfloat16().float())
    assert 1e-4 < float((got - layer(x)).detach().abs().max()) < 0.05
    linear, x = nn.Linear(30, 20, bias), torch.randn(7, 30)
    bias_of = linear.bias.detach().double() if bias else 0
    want = x.bfloat16().double() @ linear.weight.detach().bfloat16().double().T + bias_of
    assert torch.allclose(Bfloat16(linear)(x).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_deployed_layer_computes_the_same(bias: bool) -> None:
    model = nn.Sequential(Bfloat16(conv(bias)), nn.ReLU(), nn.Flatten(), Bfloat16(nn.Linear(8 * 5 * 4, 5, bias))).eval()
    deployed, x = deploy(model), torch.randn(3, 6, 11, 9)
    assert isinstance(deployed[0], Bfloat16Conv2d)  # type: ignore[index]
    assert isinstance(deployed[3], Bfloat16Linear)  # type: ignore[index]
    assert torch.equal(deployed(x), model(x))
    program = torch.export.export(deployed, (x,))
    assert torch.equal(program.module()(x), model(x))


def test_gradients_pass_the_rounding_as_they_are() -> None:
    linear, x = nn.Linear(9, 4), torch.randn(5, 9, requires_grad=True)
    slope = torch.randn(5, 4)
    (Bfloat16(linear)(x) * slope).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert torch.equal(x.grad, slope @ linear.weight.detach().bfloat16().float())
    assert torch.equal(linear.weight.grad, slope.T @ x.detach().bfloat16().float())


def test_a_depthwise_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="depthwise convolution sums no channels"):
        Bfloat16(nn.Conv2d(8, 8, 3, groups=8))
    Bfloat16(nn.Conv2d(1, 8, 3))


def test_stored_are_two_bytes_a_weight_and_the_bias() -> None:
    linear = nn.Linear(30, 20)
    assert stored_bytes(Bfloat16(linear)) == entropy_coded_bytes(Bfloat16(linear)) == 2 * 600 + 4 * 20
    shared = share(nn.Linear(30, 20), 4)
    assert isinstance(shared, nn.Linear)
    of_four = Bfloat16(shared)
    assert stored_bytes(of_four) == 4 * 4 + 600 * 2 // 8 + 4 * 20
    x = torch.randn(2, 30)
    assert torch.equal(deploy(nn.Sequential(of_four))(x), of_four.eval()(x))
    assert stored_bytes(Bfloat16(share(nn.Linear(4, 4), 16))) == 2 * 16 + 4 * 4


class Small(nn.Module):
    """Convolutions of several kinds and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise, self.last = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.wide(self.first(x).relu()).relu()).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def small() -> tuple[TracedModel, Proposal]:
    traced = trace(Small().eval(), torch.randn(1, 3, 8, 8))
    return traced, propose(traced, lanes=8, bfloat16=True)


def options_of(proposal: Proposal, name: str) -> tuple[Any, ...]:
    return next(choice.options for choice in proposal.space.choices if choice.name == name)


def test_it_is_an_option_where_a_device_multiplies_it(small: tuple[TracedModel, Proposal]) -> None:
    traced, proposal = small
    for name in ("first", "wide", "last"):
        assert options_of(proposal, f"{name}:bits") == (None, "bf16", 8, 4)
        assert options_of(propose(traced, lanes=8), f"{name}:bits") == (None, 8, 4)
    assert options_of(proposal, "depthwise:bits") == (None, 8, 4)
    wide = trace(nn.Sequential(nn.Linear(4096, 256)).eval(), torch.randn(1, 4096))
    assert options_of(propose(wide), "0:bits") == (None, "bf16", "w8", 8, "w4", 4)


@pytest.mark.parametrize("other", [{}, {"wide:rank": 1}, {"wide:block": "separable"}, {"wide:cluster": 16}], ids=str)
def test_a_candidate_with_it_is_built_stored_rebuilt_and_counted(
    small: tuple[TracedModel, Proposal], other: dict[str, Any]
) -> None:
    traced, proposal = small
    other = {name: options_of(proposal, name)[1] if value == 1 else value for name, value in other.items()}
    candidate = Candidate({**proposal.space.original().options, "wide:bits": "bf16", **other})
    x = torch.randn(64, 3, 8, 8)
    module = apply(candidate, traced, proposal, x)
    wrapped = [part.inner for part in module.modules() if isinstance(part, Bfloat16)]
    assert wrapped
    assert all(layer.groups == 1 for layer in wrapped if isinstance(layer, nn.Conv2d)), "the depthwise part stays"
    again = rebuild(candidate, traced, proposal, state(module))
    with torch.no_grad():
        assert torch.equal(again(x), module(x))
        assert torch.allclose(deploy(module)(x), module(x), atol=1e-5)
    options = {Kind(name.partition(":")[2]): option for name, option in candidate.options.items() if "wide:" in name}
    layer = traced.module.get_submodule("wide")
    assert isinstance(layer, nn.Conv2d)
    planned = layers_at(shape_of(layer, (8, 8)), options, proposal.lanes, same_channels=False)
    rest = sum(stored_bytes(traced.module.get_submodule(name)) for name in ("first", "depthwise", "last"))
    assert sum(part.stored_bytes for part in planned) + rest == stored_bytes(module)
    assert {part.bits for part in planned} == ({16, 32} if other.get("wide:block") else {16})
    assert stored_bytes(skeleton(candidate, traced, proposal)) == stored_bytes(module)
    assert count_macs(deploy(module), x[:1]) == count_macs(module, x[:1])


def test_its_error_is_less_than_that_of_bytes(small: tuple[TracedModel, Proposal]) -> None:
    traced, proposal = small
    choice = next(choice for choice in proposal.space.choices if choice.name == "wide:bits")
    seen = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    none, halves, whole, _ = local_errors(traced, proposal, seen, [choice]).errors["wide:bits"]
    assert none == 0 < 4 * halves < whole
