"""Where candidates are trained, and that training works where tensors are not on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from planish.search.data_augment import Augment
from planish.search.errors import UserError
from planish.search.training_device import device_for, gpu_share, gpus_here
from planish.spaces.quantize import Quantized, Range


def test_the_cpu_is_used_where_it_is_wanted_or_nothing_else_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_here("cpu") == 0
    assert gpus_here("auto") == gpus_here("cuda") == 2
    assert device_for("cpu", True).type == "cpu"
    assert device_for("auto", False).type == "cpu"
    assert device_for("auto", True).type == device_for("cuda", True).type == "cuda"


def test_a_gpu_that_is_asked_for_and_not_there_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_here("auto") == 0
    assert device_for("auto", True).type == "cpu"
    for refused in (lambda: gpus_here("cuda"), lambda: gpu_share("cuda", 0, 4), lambda: device_for("cuda", True)):
        with pytest.raises(UserError, match=r'distill.device = "cuda" and there is no CUDA GPU .*"auto" or "cpu"'):
            refused()


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("trainings", [1, 2, 3, 7, 16, 100])
def test_shares_fill_the_gpus_and_no_gpu_has_more_than_it_is(gpus: int, trainings: int) -> None:
    share = gpu_share("auto", gpus, trainings)
    on_each = int(1 / share + 1e-9)
    assert 1 <= on_each <= 8
    assert on_each * gpus >= min(trainings, 8 * gpus)  # as many at once as there are, or as a GPU takes
    assert share * -(-min(trainings, 8 * gpus) // gpus) <= 1


def test_without_a_gpu_there_is_no_share() -> None:
    assert gpu_share("auto", 0, 4) == gpu_share("cpu", 2, 4) == 0


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_scales_that_stay_tensors_compute_and_learn_the_same(low: float) -> None:
    from planish.spaces import quantize

    x = torch.linspace(-2, 3, 41)
    scale, zero = Quantized(nn.Linear(1, 1), 8, Range(low, 1.0)).input_scale()
    found = []
    for given in ((float(scale), int(zero)), (scale, zero)):
        own = x.clone().requires_grad_()
        function = quantize._Steps if isinstance(given[0], float) else quantize._StepsOfTensors
        result = function.apply(own, *given)  # type: ignore[no-untyped-call]
        (result * torch.arange(41)).sum().backward()
        found.append((result.detach(), own.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_quantised_network_trains_where_its_tensors_are() -> None:
    # The meta device computes shapes alone, but refuses tensors of the CPU among its own as a GPU does.
    network = nn.Sequential(
        Quantized(nn.Conv2d(3, 4, 3), 8, Range(0, 1)),
        nn.ReLU(),
        nn.Flatten(),
        Quantized(nn.Linear(144, 2), 4, Range(0, 1)),
    )
    moved = copy.deepcopy(network).to("meta").train()
    images = Augment(shift=2, flip=True)(torch.zeros(5, 3, 8, 8, device="meta"), torch.Generator().manual_seed(0))
    loss = moved(images).square().mean()
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in moved.parameters())
