"""The default space: what is offered where, and a reason for everything that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.spaces import Kind
from planish.spaces.propose import propose
from planish.spaces.prune import kept_channels
from planish.spaces.trace import trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


def test_every_layer_with_parameters_has_a_choice_or_a_reason_for_every_family(net: Net) -> None:
    space = net.proposal.space
    choices = {choice.name for choice in space.choices}
    pruned = {m.name for group in net.proposal.groups.values() for m in group.members if m.role in ("out", "both")}
    for layer in net.traced.layers:
        if ":" in layer.name or layer.name in space.left_out:
            continue
        for kind in Kind:
            name = f"{layer.name}:{kind.value}"
            covered = kind is Kind.PRUNE and layer.name in pruned
            no_kernel = kind is Kind.BLOCK and _kernel(net, layer.name) in ("", "1x1")
            assert name in choices or name in space.left_out or covered or no_kernel, name
    assert all(reason and "\n" not in reason for reason in space.left_out.values())
    assert not choices & set(space.left_out)


def _kernel(net: Net, name: str) -> str:
    layer = net.model.get_submodule(name)
    return "x".join(map(str, layer.kernel_size)) if isinstance(layer, nn.Conv2d) else ""


def test_the_first_option_leaves_the_site_as_it_is_and_all_are_json_scalars(net: Net) -> None:
    for choice in net.proposal.space.choices:
        assert choice.options[0] is None
        assert all(isinstance(option, int | float | str) for option in choice.options[1:])


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_pruning_keeps_whole_vectors(nets: dict[str, Net], lanes: int) -> None:
    proposal = propose(nets["resnet20"].traced, lanes=lanes, families=[Kind.PRUNE])
    assert proposal.space.choices
    for choice in proposal.space.choices:
        width = proposal.groups[choice.site].width
        kept = [kept_channels(width, float(option)) for option in choice.options[1:] if option is not None]
        assert all(keep % lanes == 0 and lanes <= keep < width for keep in kept)
        assert kept == sorted(set(kept), reverse=True)
        assert list(choice.options[1:]) == [(width - keep) / width for keep in kept]


def test_a_layer_of_one_vector_is_left_out_of_pruning_with_the_reason(nets: dict[str, Net]) -> None:
    reason = nets["resnet20"].proposal.space.left_out["layer1.0.conv1:prune"]
    assert reason == "16 channels fill one vector of 16 lanes; fewer would not be faster"


def test_only_the_families_that_are_asked_for_are_offered(nets: dict[str, Net]) -> None:
    for kind in Kind:
        space = propose(nets["mobile"].traced, families=[kind]).space
        assert {choice.kind for choice in space.choices} == {kind}
        assert all(name.partition(":")[2] in ("", kind.value) for name in space.left_out)


def test_choices_are_in_the_order_of_execution(net: Net) -> None:
    order = [layer.name for layer in net.traced.layers]
    sites = [order.index(choice.site) for choice in net.proposal.space.choices]
    assert sites == sorted(sites)


def test_a_proposal_is_the_same_every_time(net: Net) -> None:
    again = propose(net.traced)
    assert again == net.proposal


def test_an_images_first_layer_is_quantised_and_shared_but_keeps_its_block_and_rank(nets: dict[str, Net]) -> None:
    kinds = {choice.kind for choice in nets["resnet"].proposal.space.choices if choice.site == "conv1"}
    assert kinds == {Kind.PRUNE, Kind.CLUSTER, Kind.BITS}


class Entangled(nn.Module):
    """Reads more of a layer than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.wide = nn.Linear(32, 32).to(torch.float64)
        self.conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.c.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)) * self.b.in_features
        y = self.normed(self.b(y))
        y = self.wide(y.double()).float()
        z: Tensor = self.c(self.conv(y[:, None, None])[:, 0, 0])
        return z


def test_layers_that_cannot_be_replaced_say_why() -> None:
    space = propose(trace(Entangled(), torch.randn(1, 32)), lanes=8, families=[Kind.BITS]).space
    assert [choice.site for choice in space.choices] == ["a"]
    assert "the model uses more of it than its output" in space.left_out["b"]
    assert "in_features" in space.left_out["b"]
    assert space.left_out["c"] == "it has forward hooks, which a replacement would lose"
    assert "float64" in space.left_out["wide"]
    assert "padding" in space.left_out["conv"]
    assert "may compute something else than a Linear" in space.left_out["normed"]


def test_a_module_of_another_type_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(4, 32, 3), nn.ReLU(), nn.Conv1d(32, 8, 3), nn.LayerNorm(6))
    proposal = propose(trace(model, torch.randn(1, 4, 10)))
    assert [choice.name for choice in proposal.space.choices] == ["0:prune"]
    assert proposal.space.left_out["0:bits"] == "there is nothing to put for a Conv1d"
    assert proposal.space.left_out["3"] == "there is nothing to put for a LayerNorm"


def test_no_lanes_are_refused(nets: dict[str, Net]) -> None:
    with pytest.raises(ValueError, match="lanes is 0"):
        propose(nets["mlp"].traced, lanes=0)
