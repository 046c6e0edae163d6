"""Candidates made real: whatever the space can sample applies, runs, deploys, exports and reloads."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.spaces import Candidate, Kind, Option
from planish.spaces.apply import ApplyError, apply, notes, rebuild, restore, simplify, state
from planish.spaces.propose import propose
from planish.spaces.prune import kept_channels
from planish.spaces.quantize import Quantized, deploy
from planish.spaces.size import count_macs, stored_bytes
from planish.spaces.trace import trace

if TYPE_CHECKING:
    from tests.spaces.conftest import Net


def strongest(net: Net, *kinds: Kind) -> Candidate:
    """The last option of every choice of some kinds."""
    original = net.proposal.space.original().options
    return Candidate(
        {c.name: c.options[-1] if c.kind in kinds else original[c.name] for c in net.proposal.space.choices}
    )


def outputs(module: nn.Module, net: Net) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(net.calibration[:4])
    return out


@pytest.mark.parametrize("seed", range(3))
def test_any_candidate_applies_runs_deploys_and_reloads(net: Net, seed: int) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(seed))
    module = apply(candidate, net.traced, net.proposal, net.calibration)
    got = outputs(module, net)
    assert not any(part.training for part in module.modules())
    assert got.shape == outputs(net.model, net).shape
    assert torch.isfinite(got).all()
    assert torch.equal(outputs(deploy(module), net), got)  # the same float32 operations on the same integers
    assert torch.equal(outputs(rebuild(candidate, net.traced, net.proposal, state(module)), net), got)
    assert stored_bytes(module) <= stored_bytes(net.model)
    assert count_macs(module, net.example) <= count_macs(net.model, net.example)


def test_a_deployed_candidate_exports_to_known_operators(net: Net) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(7))
    deployed = deploy(apply(candidate, net.traced, net.proposal, net.calibration))
    program = torch.export.export(deployed, (net.example,))
    called, known = (
        {str(node.target) for node in p.graph.nodes if node.op == "call_function"}
        for p in (program, torch.export.export(net.model, (net.example,)))
    )
    added = {str(name).partition(".")[2].partition(".")[0] for name in called - known}
    assert added <= {"quantize", "qconv2d", "qlinear", "conv2d", "linear", "reshape", "view", "transpose", "clone"}
    assert torch.equal(program.module()(net.example), deployed(net.example))


@pytest.mark.parametrize("kind", Kind)
def test_the_strongest_options_of_one_kind_apply(net: Net, kind: Kind) -> None:
    candidate = strongest(net, kind)
    module = apply(candidate, net.traced, net.proposal, net.calibration)
    assert torch.equal(outputs(deploy(module), net), outputs(module, net))
    if candidate != net.proposal.space.original():
        assert stored_bytes(module) < stored_bytes(net.model)


def test_the_strongest_options_of_all_kinds_apply_together(net: Net) -> None:
    module = apply(strongest(net, *Kind), net.traced, net.proposal, net.calibration)
    assert torch.isfinite(outputs(module, net)).all()


def test_the_original_candidate_computes_what_the_model_computes(net: Net) -> None:
    module = apply(net.proposal.space.original(), net.traced, net.proposal, net.calibration)
    assert torch.equal(outputs(module, net), outputs(net.model, net))
    assert notes(module) == ()


def test_neither_the_users_model_nor_the_traced_one_changes(net: Net) -> None:
    before = [copy.deepcopy(m.state_dict()) for m in (net.model, net.traced.module)]
    apply(strongest(net, *Kind), net.traced, net.proposal, net.calibration)
    for old, module in zip(before, (net.model, net.traced.module), strict=True):
        new = module.state_dict()
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], old[name]) for name in old)
        assert not any(part._forward_pre_hooks for part in module.modules())


def test_the_same_candidate_gives_the_same_weights_every_time(net: Net) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(11))
    first, second = (state(apply(candidate, net.traced, net.proposal, net.calibration)) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pruned_widths_are_those_of_the_options(net: Net) -> None:
    candidate = strongest(net, Kind.PRUNE)
    module = apply(candidate, net.traced, net.proposal, net.calibration)
    for site, group in net.proposal.groups.items():
        keep = kept_channels(group.width, float(candidate.options[f"{site}:prune"] or 0))
        assert len(module.get_submodule(site).get_parameter("weight")) == keep


def test_with_calibration_mild_compression_is_nearer_to_the_original_than_without(nets: dict[str, Net]) -> None:
    net = nets["resnet"]
    options = dict(net.proposal.space.original().options)
    options["layer3.0.conv1:prune"] = options["layer2.0.conv1:prune"] = 0.5
    errors = [
        float((outputs(apply(Candidate(options), net.traced, net.proposal, c), net) - outputs(net.model, net)).norm())
        for c in (net.calibration, None)
    ]
    assert errors[0] < errors[1]


def test_training_a_compressed_model_and_reloading_it_gives_the_same_outputs(nets: dict[str, Net]) -> None:
    net = nets["mobile"]
    candidate = net.proposal.space.sample(np.random.default_rng(3))
    module = apply(candidate, net.traced, net.proposal, net.calibration).train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        module(net.calibration).square().mean().backward()
        optimiser.step()
    module.eval()
    saved = state(module)
    pointers = [tensor.data_ptr() for tensor in saved.values()]
    assert len(set(pointers)) == len(pointers)
    assert all(tensor.is_contiguous() for tensor in saved.values())
    again = rebuild(candidate, net.traced, net.proposal, saved)
    assert torch.equal(outputs(again, net), outputs(module, net))
    assert torch.equal(outputs(deploy(module), net), outputs(module, net))


def test_bits_quantise_every_layer_at_their_sites(net: Net) -> None:
    module = apply(strongest(net, Kind.BITS), net.traced, net.proposal, net.calibration)
    plain = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.endswith(".inner")
    ]
    assert plain == []
    assert {layer.bits for layer in module.modules() if isinstance(layer, Quantized)} == {4}


def test_simplify_drops_what_apply_ignores_and_nothing_else(net: Net) -> None:
    candidate = net.proposal.space.sample(np.random.default_rng(2))
    simple = simplify(candidate, net.traced, net.proposal)
    assert net.proposal.space.decode(net.proposal.space.encode(simple)) == simple
    module, same = (apply(c, net.traced, net.proposal, net.calibration) for c in (candidate, simple))
    assert torch.equal(outputs(same, net), outputs(module, net))
    assert len(notes(same)) <= len(notes(module))
    assert simplify(simple, net.traced, net.proposal) == simple


def test_options_that_do_not_fit_together_are_noted(nets: dict[str, Net]) -> None:
    net = nets["resnet"]
    options: dict[str, Option] = dict(net.proposal.space.original().options)
    options |= {"layer1.0.conv2:block": "identity", "layer1.0.conv2:rank": "spatial:16", "layer1.0.conv1:prune": 0.5}
    options |= {"layer1.0.conv2:bits": 8, "layer3.0.conv2:block": "grouped", "layer3.0.conv2:rank": "tucker:16x16"}
    module = apply(Candidate(options), net.traced, net.proposal, net.calibration)
    text = "\n".join(notes(module))
    assert "layer1.0.conv2: identity became pointwise" in text
    assert "layer1.0.conv2: rank spatial:16" in text
    assert "layer3.0.conv2: rank tucker:16x16 is ignored" in text


def test_identity_between_two_groups_of_one_width_is_not_taken_for_an_identity(nets: dict[str, Net]) -> None:
    net = nets["resnet"]
    options: dict[str, Option] = dict(net.proposal.space.original().options)
    options |= {"layer1.0.conv2:block": "identity", "layer1.0.conv1:prune": 0.5, "conv1:prune": 0.5}
    module = apply(Candidate(options), net.traced, net.proposal)
    assert module.get_submodule("layer1.0.conv2").get_parameter("weight").shape == (16, 16, 1, 1)


def test_identity_inside_one_group_stays_one_after_pruning() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            z: Tensor = self.head(y + self.conv(y))
            return z

    traced = trace(Residual(), torch.randn(1, 3, 6, 6))
    proposal = propose(traced, families=[Kind.PRUNE, Kind.BLOCK])
    options = dict(proposal.space.original().options) | {"stem:prune": 0.5, "conv:block": "identity"}
    module = apply(Candidate(options), traced, proposal)
    assert isinstance(module.get_submodule("conv"), nn.Identity)
    assert notes(module) == ()


def test_quantising_without_calibration_is_refused(nets: dict[str, Net]) -> None:
    net = nets["mlp"]
    with pytest.raises(ValueError, match="needs calibration"):
        apply(strongest(net, Kind.BITS), net.traced, net.proposal)


def test_a_candidate_of_another_space_is_refused(nets: dict[str, Net]) -> None:
    net = nets["mlp"]
    with pytest.raises(ValueError, match="which the space does not have"):
        apply(nets["mobile"].proposal.space.original(), net.traced, net.proposal)


def test_weights_of_another_candidate_are_refused_by_name(nets: dict[str, Net]) -> None:
    net = nets["mlp"]
    module = apply(net.proposal.space.original(), net.traced, net.proposal)
    pruned = state(apply(strongest(net, Kind.PRUNE), net.traced, net.proposal))
    with pytest.raises(ValueError, match=r"0\.weight has shape \(32, 64\), not \(128, 64\)"):
        restore(module, pruned)
    with pytest.raises(ValueError, match=r"0\.weight is missing"):
        restore(module, {})
    with pytest.raises(ValueError, match="extra is not in the model"):
        restore(module, state(module) | {"extra": torch.zeros(1)})


def test_outputs_that_are_not_finite_are_an_error(nets: dict[str, Net]) -> None:
    net = nets["mlp"]
    broken = copy.deepcopy(net.traced)
    with torch.no_grad():
        broken.module.get_parameter("0.weight")[0, 0] = torch.nan
    with pytest.raises(ApplyError, match="not finite"):
        apply(net.proposal.space.original(), broken, net.proposal)
