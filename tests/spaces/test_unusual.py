"""Models that are written in other ways than most: every family's candidates are built, run, trained and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from planish.spaces.apply import apply, skeleton
from planish.spaces.local_error import local_errors
from planish.spaces.propose import Proposal, propose
from planish.spaces.quantize import deploy
from planish.spaces.space import Candidate, Kind, Option
from planish.spaces.trace import TraceError, trace


class Head(nn.Module):
    """Convolutions, whose channels are averaged and classified; `body` makes (n, 32, h, w) of (n, 3, h, w)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).mean((2, 3)))
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layer(self.embed(x.reshape(-1, 8, 12))).mean(1))
        return out


class Standardised(nn.Conv2d):
    """Its weights are brought to a mean of zero as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ByFunction(nn.Module):
    """A convolution that is no module, beside two that are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.weight = nn.Parameter(torch.randn(32, 32, 1, 1) / 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(F.conv2d(F.relu(self.first(x)), self.weight)))
        return out


class LastChannels(nn.Module):
    """A ConvNeXt block's linear layers, which read (n, h, w, c) of an image as high as it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        out: Tensor = y + self.down(F.gelu(self.up(self.norm(y.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return out


class ByName(nn.Module):
    """Layers that are given their input by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(input=F.relu(self.first(input=x)))
        return out


class Aliased(nn.Module):
    """A part of a network under a second name, by which it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Linear(7, 7))
        self.features = nn.Sequential(*list(self.backbone.children())[:-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(x)
        return out


class Late(nn.Module):
    """A linear layer that reads the pixels of channels and something else behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 32, 3, stride=8), nn.Linear(32 * 16 + 10, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.cat([F.relu(self.conv(x)).flatten(1), x.flatten(1)[:, :10]], 1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.fc = nn.Linear(12, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.gru(self.embed(x.reshape(-1, 8, 12)))[0][:, -1])
        return out


class InPlace(nn.Module):
    """What follows a convolution writes its result in the place of the convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        out: Tensor = y + F.relu_(self.conv(y))
        return out


def changed(proposal: Proposal, **options: Option) -> Candidate:
    """The original with some options."""
    return Candidate({**proposal.space.original().options, **options})


IMAGE, ROW = (3, 32, 32), (96,)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, ROW),
    "standardised weights": (lambda: Head(nn.Sequential(Standardised(3, 32, 3, bias=False), nn.ReLU())), IMAGE),
    "weight norm": (lambda: Head(parametrizations.weight_norm(nn.Conv2d(3, 32, 3, bias=False))), IMAGE),
    "by function": (lambda: Head(ByFunction()), IMAGE),
    "channels last": (lambda: Head(LastChannels()), IMAGE),
    "by name": (lambda: Head(ByName()), IMAGE),
    "aliased": (lambda: Head(Aliased()), IMAGE),
    "late": (Late, IMAGE),
    "recurrent": (Recurrent, ROW),
    "in place": (lambda: Head(InPlace()), IMAGE),
    "one slope": (
        lambda: Head(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.PReLU(), nn.Conv2d(32, 32, 3))),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_candidates_of_every_family_are_built_run_trained_and_exported(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs = torch.randn(48, *shape)
    traced = trace(model, inputs)
    proposal = propose(traced)
    with torch.no_grad():
        wanted = model(inputs[:4])
        assert torch.equal(apply(proposal.space.original(), traced, proposal, inputs)(inputs[:4]), wanted)
    found = local_errors(traced, proposal, inputs)
    assert not found.failed
    for kind in Kind:
        strongest = {c.name: c.options[-1] for c in proposal.space.choices if c.kind is kind}
        if not strongest:
            continue
        candidate = changed(proposal, **strongest)
        skeleton(candidate, traced, proposal)
        module = apply(candidate, traced, proposal, inputs)
        with torch.no_grad():
            scored = module(inputs[:4])
            exported = torch.export.export(deploy(module), (inputs[:1],)).module()(inputs[:1])
        assert scored.isfinite().all()
        torch.testing.assert_close(exported, scored[:1], rtol=1e-3, atol=1e-4)
        module.train()
        module(inputs[:4]).square().mean().backward()


def test_linear_layers_over_images_are_refitted_by_their_features() -> None:
    torch.manual_seed(0)
    images = LastChannels().eval()
    inputs = torch.randn(24, *IMAGE)

    class Tokens(nn.Module):
        """The same network on (n, places, c)."""

        def __init__(self) -> None:
            super().__init__()
            for part, layer in copy.deepcopy(images).named_children():
                self.add_module(part, layer)

        def forward(self, x: Tensor) -> Tensor:
            y = self.get_submodule("stem")(x)
            up, down, norm = (self.get_submodule(part) for part in ("up", "down", "norm"))
            out: Tensor = y + down(F.gelu(up(norm(y.flatten(2).transpose(1, 2))))).transpose(1, 2).unflatten(
                2, (32, 32)
            )
            return out

    results = []
    for body in (images, Tokens().eval()):
        traced = trace(Head(body).eval(), inputs)
        proposal = propose(traced)
        torch.manual_seed(1)
        traced.module.get_submodule("fc").load_state_dict(nn.Linear(32, 5).state_dict())
        module = apply(changed(proposal, **{"body.up:prune": 0.5}), traced, proposal, inputs)
        with torch.no_grad():
            results.append(module(inputs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_a_convolution_left_out_before_an_operation_in_place_leaves_its_input_alone() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, *IMAGE)
    traced = trace(Head(InPlace()).eval(), inputs)
    proposal = propose(traced)
    module = apply(changed(proposal, **{"body.conv:block": "identity"}), traced, proposal, inputs)
    with torch.no_grad():
        y = module.get_submodule("body.stem")(inputs)
        torch.testing.assert_close(module.get_submodule("body")(inputs), y + F.relu(y))


def test_a_part_under_two_names_is_compressed_under_both() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, *IMAGE)
    traced = trace(Head(Aliased()).eval(), inputs)
    proposal = propose(traced)
    module = apply(changed(proposal, **{"body.backbone.2:bits": 8}), traced, proposal, inputs)
    assert module.get_submodule("body.features.2") is module.get_submodule("body.backbone.2")
    assert type(module.get_submodule("body.features.2")) is not nn.Conv2d
    assert any(choice.name == "body.backbone.0:prune" for choice in proposal.space.choices)


def test_a_model_that_writes_to_its_input_is_refused() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            out: Tensor = self.fc(x)
            return out

    with pytest.raises(TraceError, match="writes to its input"):
        trace(Writing().eval(), torch.randn(2, 4))
