"""The table of layers of a traced model, and what is said when there is none."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces.size import count_macs
from planish.spaces.trace import TraceError, trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


def test_every_layer_with_parameters_is_in_the_table_once(net: Net) -> None:
    names = [layer.name for layer in net.traced.layers]
    owners = [name for name, module in net.model.named_modules() if list(module.parameters(recurse=False))]
    assert sorted(name for name in names if ":" not in name) == sorted(owners)
    assert len(set(names)) == len(names)
    assert sum(layer.parameters for layer in net.traced.layers) == sum(p.numel() for p in net.model.parameters())


def test_macs_are_what_torch_counts(net: Net) -> None:
    assert sum(layer.macs for layer in net.traced.layers) == count_macs(net.model, net.example)


def test_macs_of_a_convolution_are_outputs_times_the_weights_of_one(nets: dict[str, Net]) -> None:
    layer = next(layer for layer in nets["mobile"].traced.layers if layer.name == "right")
    assert (layer.in_shape, layer.out_shape) == ((32, 8, 8), (48, 8, 8))
    assert layer.macs == 48 * 8 * 8 * 32 * 3 * 5


def test_the_table_says_what_feeds_what(nets: dict[str, Net]) -> None:
    feeds = nets["mobile"].traced.feeds()
    (add,) = feeds["project.1"]
    assert add.endswith(":add")
    assert set(feeds[add]) == {"left", "right"}
    assert add in feeds["stem.2:hardtanh"]
    assert feeds["fc2"] == ()


def test_the_users_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2)).train()
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, torch.randn(2, 3, 6, 6))
    assert model.training
    assert not traced.module.training
    assert model[0].padding == "same"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in traced.module.parameters()}
    assert not shared


def test_named_padding_becomes_numbers_that_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), nn.Conv2d(3, 2, 3, padding="valid"))
    x = torch.randn(1, 2, 9, 9)
    traced = trace(model, x)
    assert [layer.padding for layer in traced.module.children()] == [(2, 2), (0, 0)]
    assert torch.equal(traced.module(x), model.eval()(x))


def test_a_module_that_runs_twice_is_one_layer_with_all_its_macs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(F.relu(self.linear(x)))
            return y

    layer = trace(Twice(), torch.randn(1, 8)).layers[0]
    assert (layer.name, layer.calls, layer.macs) == ("linear", 2, 2 * 64)


def test_a_weight_that_is_read_elsewhere_is_an_obstacle() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.c = nn.Linear(8, 8)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.b(F.linear(self.a(x), self.a.weight)))
            return y

    obstacles = {layer.name: layer.obstacle for layer in trace(Reads(), torch.randn(1, 8)).layers}
    assert obstacles["a"] == "its weight is also read by the model's own forward"
    assert "weight" in obstacles["b"]
    assert "weight" in obstacles["c"]


def test_a_model_that_is_one_layer_has_a_name_for_it() -> None:
    assert [layer.name for layer in trace(nn.Linear(3, 2), torch.randn(4, 3)).layers] == ["0"]


def test_recurrent_layers_count_every_step() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            steps: Tensor = self.cell(x)[0]
            return steps[:, -1]

    traced = trace(Recurrent(), torch.randn(1, 7, 6))
    assert sum(layer.macs for layer in traced.layers) == 7 * 3 * 5 * (6 + 5)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # this line
            return x + 1
        return x


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int(x.sum().item())]  # this line


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(5, 5)  # this line


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Branches(), "depends on the values of the input"), (Counts(), "depends on the values"), (Fails(), "shapes")],
)
def test_an_untraceable_model_is_refused_in_one_line_that_names_its_line(model: nn.Module, reason: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(model, torch.ones(1, 3, 8, 8))
    message = str(caught.value)
    assert "\n" not in message
    assert reason in message
    number = int(message.rpartition(":")[2].rstrip(")"))
    with open(__file__, encoding="utf-8") as source:
        assert source.readlines()[number - 1].rstrip().endswith("# this line")
    assert "test_trace.py" in message


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda x: (x, x), "returns a tuple"),
        (lambda x: x.sum(), "the batch must come first"),
        (lambda x: torch.cat([x, x]), "the batch must come first"),
    ],
)
def test_a_model_that_does_not_return_one_tensor_with_the_batch_first_is_refused(output: object, reason: str) -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> object:
            assert callable(output)
            return output(x)

    with pytest.raises(TraceError, match=reason):
        trace(Returns(), torch.ones(1, 3))


def test_an_example_without_a_batch_is_refused() -> None:
    with pytest.raises(TraceError, match="batch dimension"):
        trace(nn.Linear(2, 2), torch.tensor(1.0))


def test_what_the_user_froze_is_there_to_be_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    model.register_parameter("constant", nn.Parameter(torch.ones(1), requires_grad=False))
    module = trace(model, torch.randn(2, 3, 4, 4)).module
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
