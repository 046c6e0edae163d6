"""Linear layers with whole weights and float inputs, against the definition; and where they are an option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.spaces import Candidate, Kind
from planish.spaces import propose as propose_file
from planish.spaces.apply import apply, rebuild, skeleton, state
from planish.spaces.bit_widths import LEVELS
from planish.spaces.cluster import share
from planish.spaces.integer import WeightOnlyLinear
from planish.spaces.layer_shapes import layers_at, shape_of
from planish.spaces.local_error import local_errors
from planish.spaces.propose import Proposal, propose
from planish.spaces.quantize import deploy
from planish.spaces.size import count_macs, stored_bytes
from planish.spaces.trace import TracedModel, trace
from planish.spaces.weight_only import WeightQuantized


def layer(inputs: int = 30, outputs: int = 20, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_whole_weights_times_a_scale_a_channel(bits: int, bias: bool) -> None:
    linear, x = layer(bias=bias), torch.randn(7, 30)
    quantised = WeightQuantized(linear, bits).eval()
    scale = linear.weight.detach().abs().amax(1) * quantised.clip / LEVELS[bits]
    whole = torch.clamp(torch.round(linear.weight / scale[:, None]), -LEVELS[bits], LEVELS[bits])
    want = x.double() @ (whole * scale[:, None]).double().T + (linear.bias.double() if bias else 0)
    assert torch.allclose(quantised(x).double(), want, rtol=0, atol=1e-5)
    assert ((quantised.clip > 0) & (quantised.clip <= 1)).all()
    assert quantised.integer().weight.abs().max() <= LEVELS[bits]
    quantised.train()
    assert torch.allclose(quantised(x).double(), want, rtol=0, atol=1e-5)


def test_the_deployed_layer_computes_the_same_and_the_fewer_bits_the_more_error() -> None:
    linear, x = layer(), torch.randn(9, 5, 30)
    errors = []
    for bits in (8, 4):
        quantised = WeightQuantized(linear, bits).eval()
        deployed = deploy(nn.Sequential(quantised))
        assert isinstance(deployed[0], WeightOnlyLinear)  # type: ignore[index]
        assert torch.equal(deployed(x), quantised(x))
        with torch.no_grad():
            errors.append(float((quantised(x) - linear(x)).square().mean()))
    assert 0 < 100 * errors[0] < errors[1]


def test_the_best_clip_is_no_worse_than_none() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(400, 8)
    with torch.no_grad():
        linear.weight[:, 0] = 5.0  # far out: the other weights gain from a smaller scale
    quantised = WeightQuantized(linear, 4)
    whole = WeightQuantized(linear, 4)
    whole.clip.fill_(1.0)
    eye = torch.eye(400)

    def error(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module.eval()(eye) - linear(eye)).square().sum())

    assert error(quantised) <= error(whole)


def test_gradients_pass_the_rounding_of_every_weight_that_is_not_clipped() -> None:
    linear, x = layer(), torch.randn(7, 30)
    quantised = WeightQuantized(linear, 4).train()
    quantised(x).sum().backward()
    weight = linear.weight.detach()
    inside = weight.abs() <= 7.5 / 7 * (weight.abs().amax(1) * quantised.clip)[:, None]
    assert 0.9 < inside.float().mean() < 1
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, x.sum(0).expand(20, 30) * inside, atol=1e-4)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^3 bits are not supported; known are 4, 8$"):
        WeightQuantized(layer(), 3)


def test_stored_are_packed_weights_a_scale_a_channel_and_the_bias() -> None:
    linear = layer()
    assert stored_bytes(WeightQuantized(linear, 8)) == 600 + 4 * 20 + 4 * 20
    assert stored_bytes(WeightQuantized(linear, 4)) == 300 + 4 * 20 + 4 * 20
    linear_of_four = share(layer(), 4)
    assert isinstance(linear_of_four, nn.Linear)
    shared = WeightQuantized(linear_of_four, 8)
    assert stored_bytes(shared) == 4 * 4 + 600 * 2 // 8 + 4 * 20 + 4 * 20
    assert torch.equal(deploy(nn.Sequential(shared))(torch.ones(1, 30)), shared.eval()(torch.ones(1, 30)))


class Wide(nn.Module):
    """A layer whose weights take the time to read, between two that are small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide, self.last = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.first(x).relu()).relu())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wide() -> tuple[TracedModel, Proposal]:
    traced = trace(Wide().eval(), torch.randn(1, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propose_file, "MEMORY_BOUND", 64 * 64)
        return traced, propose(traced, lanes=8)


def options_of(proposal: Proposal, name: str) -> tuple[Any, ...]:
    return next(choice.options for choice in proposal.space.choices if choice.name == name)


def test_it_is_an_option_of_layers_of_one_row_that_memory_binds(wide: tuple[TracedModel, Proposal]) -> None:
    _, proposal = wide
    assert options_of(proposal, "wide:bits") == (None, "bf16", "w8", 8, "w4", 4)
    assert options_of(proposal, "first:bits") == options_of(proposal, "last:bits") == (None, 8, 4)
    bound, other = (None, "bf16", "w8", 8, "w4", 4), (None, 8, 4)
    for outputs, rows, want in ((256, 1, bound), (256, 5, other), (255, 1, other)):
        traced = trace(nn.Sequential(nn.Linear(4096, outputs)).eval(), torch.randn(1, rows, 4096))
        assert options_of(propose(traced, families=(Kind.BITS,)), "0:bits") == want


@pytest.mark.parametrize("option", ["w8", "w4"])
@pytest.mark.parametrize("rank", [None, "svd:64"])
def test_a_candidate_with_it_is_built_stored_rebuilt_and_counted(
    wide: tuple[TracedModel, Proposal], option: str, rank: str | None
) -> None:
    traced, proposal = wide
    original = proposal.space.original()
    ranks = options_of(proposal, "wide:rank")
    rank = None if rank is None else next(r for r in ranks if r)
    candidate = Candidate({**original.options, "wide:bits": option, "wide:rank": rank})
    x = torch.randn(64, 16)
    module = apply(candidate, traced, proposal, x)
    assert any(isinstance(part, WeightQuantized) for part in module.modules())
    again = rebuild(candidate, traced, proposal, state(module))
    with torch.no_grad():
        assert torch.equal(again(x), module(x))
        assert torch.allclose(deploy(module)(x), module(x), atol=1e-5)
    planned = layers_at(
        shape_of(traced.module.get_submodule("wide"), (1, 1)),  # type: ignore[arg-type]
        {Kind.BITS: option, Kind.RANK: rank}, proposal.lanes, same_channels=False,
    )  # fmt: skip
    rest = sum(stored_bytes(traced.module.get_submodule(name)) for name in ("first", "last"))
    assert sum(part.stored_bytes for part in planned) + rest == stored_bytes(module)
    assert stored_bytes(skeleton(candidate, traced, proposal)) == stored_bytes(module)
    assert count_macs(deploy(module), x[:1]) == count_macs(module, x[:1])


def test_its_error_is_less_than_that_of_quantised_inputs_too(wide: tuple[TracedModel, Proposal]) -> None:
    traced, proposal = wide
    choice = next(choice for choice in proposal.space.choices if choice.name == "wide:bits")
    none, halves, w8, int8, w4, int4 = local_errors(traced, proposal, torch.randn(64, 16), [choice]).errors["wide:bits"]
    assert none == 0 < halves < w8 < int8 < int4
    assert w8 < w4 < 1.1 * int4
