"""Quantised layers: the simulation against integers, and the operators against loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish.spaces.quantize as quantize_module
from planish.spaces.cluster import share
from planish.spaces.integer import qconv2d, qlinear, quantize
from planish.spaces.quantize import LEVELS, PAIRS, Quantized, Range, deploy, input_ranges

LAYERS: list[tuple[nn.Conv2d | nn.Linear, tuple[int, ...]]] = [
    (nn.Conv2d(6, 8, 3, 2, 1), (6, 9, 9)),
    (nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, bias=False), (6, 7, 8)),
    (nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4), (8, 8, 8)),
    (nn.Conv2d(1, 9, (5, 3), 2, 1), (1, 9, 9)),
    (nn.Linear(20, 7), (20,)),
    (nn.Linear(10, 7, bias=False), (5, 10)),
]


def quantised(layer: nn.Conv2d | nn.Linear, bits: int, x: Tensor) -> Quantized:
    model = nn.Sequential(layer)
    return Quantized(copy.deepcopy(layer), bits, input_ranges(model, {"0": None}, x)["0"])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_the_simulation_equals_the_integer_layer(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], bits: int, signed: bool
) -> None:
    x = torch.randn(4, *shape) if signed else torch.rand(4, *shape)
    module = nn.Sequential(quantised(layer, bits, x)).eval()
    deployed = deploy(module)
    with torch.no_grad():
        assert torch.equal(module(x), deployed(x))  # the same float32 operations on the same integers
    whole = deployed.get_buffer("0.weight")
    assert whole.dtype == torch.int8
    assert int(whole.abs().max()) <= LEVELS[bits]
    sizes = whole.abs().int()
    if isinstance(layer, nn.Conv2d) and layer.in_channels == 1:  # columns instead of channels
        sizes = sizes.transpose(1, 3)
    assert all(int(sizes[:, i : i + 2].sum(1).max()) <= PAIRS[bits] for i in range(0, sizes.shape[1], 2))


@pytest.mark.parametrize("signed", [False, True])
def test_the_simulation_is_integer_arithmetic_on_scaled_values(signed: bool) -> None:
    layer = nn.Linear(5, 3)
    x = torch.randn(2, 5) if signed else torch.rand(2, 5)
    module = quantised(layer, 8, x).eval()
    scale, zero_point = (float(value) for value in module.input_scale())
    assert (zero_point == 0) == (not signed)
    weight_scale = module.weight_scale(layer.weight.detach())
    for n in range(2):
        for o in range(3):
            total = 0
            weights = [float(weight) / float(weight_scale[o]) for weight in layer.weight.detach()[o]]
            for i in range(5):
                step = min(max(round(float(x[n, i]) / scale) + int(zero_point), 0), 255) - int(zero_point)
                pair = sum(abs(weight) for weight in weights[i // 2 * 2 : i // 2 * 2 + 2])
                total += step * round(weights[i] * min(1.0, 127 / pair))
            expected = total * scale * float(weight_scale[o]) + float(layer.bias.detach()[o])
            assert abs(float(module(x).detach()[n, o]) - expected) < 1e-5


def test_quantize_rounds_halves_to_even_and_clamps() -> None:
    x = torch.tensor([-100.0, -0.5, 0.5, 1.5, 2.5, 1e9])
    got = quantize(x, 1.0, 3)
    assert got.dtype == torch.uint8
    assert got.tolist() == [0, 3, 3, 5, 5, 255]


def loops(x: Tensor, weight: Tensor, zero_point: int, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """The integer sums of a convolution, by its definition."""
    batch, _, height, width = x.shape
    outputs, per_group, kernel, _ = weight.shape
    size = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in (height, width)]
    result = torch.zeros(batch, outputs, *size, dtype=torch.int64)
    for n, o, row, column in torch.cartesian_prod(*(torch.arange(s) for s in result.shape)).tolist():
        start = o // (outputs // groups) * per_group
        for i, dy, dx in torch.cartesian_prod(*(torch.arange(s) for s in weight.shape[1:])).tolist():
            y, z = row * stride + dy * dilation - padding, column * stride + dx * dilation - padding
            if 0 <= y < height and 0 <= z < width:  # outside x is the zero point, which counts as 0
                value = int(x[n, start + i, y, z]) - zero_point
                result[n, o, row, column] += value * int(weight[o, i, dy, dx])
    return result


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 2), (1, 2, 2, 4)])
def test_qconv2d_is_the_definition_of_a_convolution_on_integers(
    stride: int, padding: int, dilation: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 4, 6, 5), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (4, 4 // groups, 3, 3), generator=generator).to(torch.int8)
    scale, bias = torch.rand(4, generator=generator), torch.randn(4, generator=generator)
    both = [[value, value] for value in (stride, padding, dilation)]
    got = qconv2d(x, weight, scale, bias, 7, *both, groups)
    total = loops(x, weight, 7, stride, padding, dilation, groups)
    assert torch.equal(got, total.float() * scale[:, None, None] + bias[:, None, None])


def test_sums_beyond_float32_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 90001), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (5, 90001), generator=generator).to(torch.int8)
    weight[0] = 127
    total = x.long() @ weight.long().T
    assert int(total.abs().max()) > 2**24
    got = qlinear(x, weight, torch.ones(5), torch.zeros(5), 0)
    assert torch.equal(got, total.float())


@pytest.mark.parametrize("op", ["quantize", "qconv2d", "qlinear"])
def test_the_operators_are_registered_as_torch_expects(op: str) -> None:
    x = torch.randint(0, 256, (2, 4, 6, 6), dtype=torch.uint8)
    scale, bias = torch.ones(4), torch.zeros(4)
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "quantize": (quantize, (torch.randn(2, 3), 0.1, 3)),
        "qconv2d": (qconv2d, (x, torch.ones(4, 4, 3, 3).char(), scale, bias, 3, [2, 1], [1, 0], [1, 2], 1)),
        "qlinear": (qlinear, (x, torch.ones(4, 6).char(), scale, bias, 3)),
    }
    function, arguments = cases[op]
    torch.library.opcheck(function, arguments)


def test_a_deployed_module_exports_to_the_three_operators() -> None:
    x = torch.randn(1, 4, 8, 8)
    conv = nn.Conv2d(4, 8, 3)
    model = nn.Sequential(Quantized(conv, 8, Range(-3, 3)), nn.Flatten(), Quantized(nn.Linear(288, 3), 4, Range(0, 3)))
    program = torch.export.export(deploy(model), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "planish" in name] == [
        "planish.quantize.default",
        "planish.qconv2d.default",
        "planish.quantize.default",
        "planish.qlinear.default",
    ]
    assert torch.equal(program.module()(x), deploy(model)(x))


def test_a_shared_and_quantised_layer_deploys_to_the_integers_of_its_codebook() -> None:
    x = torch.randn(4, 20)
    module = nn.Sequential(Quantized(share(nn.Linear(20, 30), 16), 8, Range(-3, 3)))
    deployed = deploy(module.eval())
    assert torch.equal(module(x), deployed(x))
    assert max(len(set(row.tolist())) for row in deployed.get_buffer("0.weight")) <= 16


def test_deploy_leaves_its_argument_alone() -> None:
    module = nn.Sequential(Quantized(nn.Linear(4, 3), 8, Range(0, 1)), nn.Dropout()).train()
    before = copy.deepcopy(module.state_dict())
    assert not deploy(module).training
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_clips_are_no_worse_than_the_full_range_for_any_channel(bits: int) -> None:
    layer = nn.Linear(200, 6)
    with torch.no_grad():
        layer.weight[0, 0] = 3.0  # an outlier
    module = Quantized(layer, bits, Range(0, 1))
    weight, levels = layer.weight.detach(), LEVELS[bits]
    pairs = weight.abs().reshape(6, 100, 2).sum(2)

    def error(scale: Tensor) -> Tensor:
        steps = weight / scale[:, None]
        if bits == 8:
            steps = steps * (127 * scale[:, None] / pairs).clamp(max=1).repeat_interleave(2, 1)
        return (torch.clamp(torch.round(steps), -levels, levels) * scale[:, None] - weight).square().sum(1)

    full = (pairs if bits == 8 else weight.abs()).amax(1) / levels
    assert (error(module.weight_scale(weight)) <= error(full) + 1e-9).all()
    assert bits == 8 or float(module.clip[1:].min()) < 1.0


def test_an_outlier_in_the_input_shrinks_the_range() -> None:
    x = torch.rand(1, 32000, generator=torch.Generator().manual_seed(0)) * 0.5
    x[0, 0] = 1.0  # clipping it to 0.95 costs 0.0025, a step of 0.95 / 255 for the others saves 0.0040
    model = nn.Sequential(nn.Linear(32000, 1))
    assert input_ranges(model, {"0": None}, x)["0"].shrink < 1.0
    assert input_ranges(model, {"0": None}, x.clamp_max(0.5))["0"].shrink == 1.0


def test_ranges_span_all_batches_and_always_hold_zero() -> None:
    x = torch.full((130, 4), 2.0)
    x[129] = 5.0
    assert input_ranges(nn.Sequential(nn.Linear(4, 2)), {"0": None}, x)["0"].high == 5.0
    assert input_ranges(nn.Sequential(nn.Linear(4, 2)), {"0": None}, x)["0"].low == 0.0
    assert input_ranges(nn.Sequential(nn.Linear(4, 2)), {"0": None}, -x)["0"].high == 0.0


def test_gradients_pass_the_rounding_and_stop_where_inputs_are_clipped() -> None:
    layer = nn.Linear(3, 2, bias=False)
    module = Quantized(copy.deepcopy(layer), 8, Range(-1, 1)).eval()
    x = torch.tensor([[0.3, 5.0, -0.2]], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    exact = layer.weight.detach().sum(0)
    assert torch.allclose(x.grad[0, [0, 2]], exact[[0, 2]], atol=0.02)  # weights are rounded to 1/127 of the largest
    assert float(x.grad[0, 1]) == 0.0
    gradient = module.inner.weight.grad
    assert gradient is not None
    assert torch.allclose(gradient, torch.tensor([[0.3, 1.0, -0.2]]).expand(2, 3), atol=1 / 127)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_training_computes_what_evaluation_does_with_the_same_gradients(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "MOMENTUM", 0.0)  # in training the range moves first; here by nothing
    x = torch.randn(4, *shape) * torch.linspace(0.5, 2, 4).reshape(-1, *[1] * len(shape))
    module = quantised(layer, bits, x / 2)
    found = []
    for training in (True, False):
        own = copy.deepcopy(module).train(training)
        given = x.clone().requires_grad_()
        outputs = own(given)
        (outputs * torch.arange(outputs[0].numel()).reshape(outputs[0].shape)).sum().backward()
        assert given.grad is not None
        found.append([outputs.detach(), given.grad, *(parameter.grad for parameter in own.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-0.3, 2.0)])
def test_what_rounds_to_the_first_and_last_step_has_a_gradient_and_what_lies_beyond_has_none(
    low: float, high: float
) -> None:
    module = Quantized(nn.Linear(1, 1), 8, Range(low, high)).eval()
    scale, zero_point = (float(value) for value in module.input_scale())
    first, last = -zero_point * scale, (255 - zero_point) * scale
    offsets = torch.tensor([-0.6, -0.4, 0.0, 0.4]) * scale
    x = torch.cat([first + offsets, last - offsets]).reshape(-1, 1).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[:, 0] != 0).tolist() == [False, True, True, True] * 2


def test_training_lowers_a_quantised_layers_loss_and_moves_its_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 8, generator=generator) * 4
    target = x @ torch.randn(8, 3, generator=generator)
    module = Quantized(nn.Linear(8, 3), 4, Range(0, 1)).train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        optimiser.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert 3.0 < float(module.high) <= 4.0
    assert float(module.low) == 0.0
    before = float(module.high)
    module.eval()(x * 2)
    assert float(module.high) == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 1, 5, 6), (1, 3, 1, 1)])
def test_the_range_follows_the_inputs_whatever_their_layout(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    module = Quantized(nn.Conv2d(shape[1], 2, 1), 8, Range(-1.0, 1.0)).train()
    module(x)
    for kept, bound in ((module.low, min(0.0, float(x.min()))), (module.high, max(0.0, float(x.max())))):
        start = -1.0 if kept is module.low else 1.0
        assert float(kept) == pytest.approx(start + quantize_module.MOMENTUM * (bound - start), rel=1e-5)


def test_an_input_that_is_always_zero_gives_the_bias() -> None:
    module = nn.Sequential(quantised(nn.Linear(4, 3), 8, torch.zeros(2, 4))).eval()
    bias = module.get_parameter("0.inner.bias")
    assert torch.equal(module(torch.zeros(1, 4))[0], bias)
    assert torch.equal(deploy(module)(torch.zeros(1, 4))[0], bias)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bits are not supported; known are 4, 8"):
        Quantized(nn.Linear(2, 2), 3, Range(0, 1))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_weights_keep_learning(bits: int) -> None:
    """They lie at the limit, where rounding of their scale must not cut their gradient off."""
    for seed in range(20):
        torch.manual_seed(seed)
        module = Quantized(nn.Linear(8, 3), bits, Range(0, 1))
        module.clip.fill_(1.0)
        module(torch.rand(4, 8)).sum().backward()
        gradient = module.get_parameter("inner.weight").grad
        assert gradient is not None
        assert bool((gradient != 0).all())


def test_a_range_is_chosen_by_what_lies_inside_an_image_too() -> None:
    """Columns whose values are small say nothing of the others: what clips those is no good range."""
    noise = torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = noise * torch.where(torch.arange(32) % 16 == 0, 0.05, 1.0)
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).eval()
    found = input_ranges(module, {"0": 8}, inputs)["0"]
    assert (found.low, found.high) == (float(inputs.min()), float(inputs.max()))

    def error(shrink: float) -> float:
        scale = (found.high - found.low) * shrink / 255
        zero = round(-found.low * shrink / scale)
        return float(((inputs / scale).round().add(zero).clamp(0, 255).sub(zero) * scale - inputs).square().mean())

    assert error(found.shrink) <= 1.1 * min(error(float(shrink)) for shrink in torch.linspace(0.3, 1, 15))
