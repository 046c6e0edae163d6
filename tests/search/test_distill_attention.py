from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from planish.search.distill_attention import FeatureTap, attention_loss, attention_map, hint_loss, stage_ends
from planish.search.zoo import CifarResNet, SmallResNet

IMAGES = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def maps(module: nn.Module, names: tuple[str, ...], inputs: Tensor = IMAGES) -> tuple[Tensor, ...]:
    with FeatureTap(module, names) as tap, torch.no_grad():
        module(inputs)
        return tuple(attention_map(feature) for feature in tap.features)


def test_an_attention_map_is_the_unit_vector_of_squares_summed_over_channels() -> None:
    activation = torch.tensor([[[[1.0, 0.0]], [[2.0, 1.0]]]])  # 2 channels, 1x2
    expected = torch.tensor([[5.0, 1.0]]) / 26**0.5
    torch.testing.assert_close(attention_map(activation), expected)
    assert attention_map(torch.zeros(1, 2, 3, 3)).isfinite().all()


def test_attention_loss_is_zero_for_the_teacher_itself_and_that_of_the_definition_for_others() -> None:
    teacher = SmallResNet().eval()
    names = stage_ends(teacher, teacher, IMAGES)
    same = maps(copy.deepcopy(teacher), names)
    assert float(attention_loss(same, maps(teacher, names))) == 0.0
    other = maps(SmallResNet((16, 32, 48)).eval(), names)
    expected = sum(float(((a - b) ** 2).sum()) / 3 for a, b in zip(other, same, strict=True))
    assert float(attention_loss(other, same)) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_stage_ends_are_the_last_modules_before_the_images_shrink() -> None:
    assert stage_ends(SmallResNet((16, 16, 16)), SmallResNet(), IMAGES) == ("stages.0", "stages.1", "stages")
    images = IMAGES.expand(3, 3, 32, 32)
    assert stage_ends(CifarResNet(8), CifarResNet(20), images) == ("layer1", "layer2", "layer3")


def test_hints_are_given_where_the_channels_agree_too() -> None:
    student = SmallResNet((16, 16, 48))
    assert stage_ends(student, SmallResNet((16, 32, 48)), IMAGES) == ("stages.0", "stages.1", "stages")
    assert stage_ends(student, SmallResNet((16, 32, 48)), IMAGES, channels=True) == ("stages.0", "stages")


def test_the_hint_loss_is_the_distance_of_features_relative_to_the_teachers() -> None:
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = float(((ours - theirs) ** 2).sum() / (theirs**2).sum())
    assert float(hint_loss([ours, theirs], [theirs, theirs])) == pytest.approx(expected, rel=1e-5)
    assert float(hint_loss([10 * ours], [10 * theirs])) == pytest.approx(expected, rel=1e-5)
    assert hint_loss([ours], [torch.zeros_like(ours)]).isfinite()


def test_a_stage_end_that_the_student_lacks_gives_way_to_the_last_one_it_has() -> None:
    student = SmallResNet(blocks=2)
    student.stages[1] = nn.ModuleDict({"0": student.stages[1][0]}).get_submodule("0")  # type: ignore[index]
    names = stage_ends(student, SmallResNet(), IMAGES)
    assert names == ("stages.0", "stages.1", "stages")
    assert stage_ends(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), SmallResNet(), IMAGES) == ()


def test_modules_whose_images_have_another_size_are_not_compared() -> None:
    student = SmallResNet()
    student.stem.stride = (1, 1)
    # 32, 16 and 8 pixels instead of 16, 8 and 4: no module agrees in name and size.
    assert stage_ends(student, SmallResNet(), IMAGES) == ()


def test_maps_of_one_pixel_are_not_compared() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert stage_ends(network, network, IMAGES) == ("0",)


def test_looking_for_stage_ends_changes_nothing() -> None:
    student = SmallResNet().train()
    before = copy.deepcopy(student.state_dict())
    stage_ends(student, SmallResNet(), IMAGES)
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not any(part._forward_hooks for part in student.modules())


def test_a_relu_in_place_after_the_tap_does_not_spoil_the_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    gradients = []
    for inplace in (True, False):
        network[1].inplace = inplace  # type: ignore[assignment]
        network.zero_grad()
        with FeatureTap(network, ("0",)) as tap:
            network(IMAGES).sum()
            attention_map(tap.features[0]).square().sum().add(1).backward()  # type: ignore[no-untyped-call]
        gradients.append(network[0].weight.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def test_a_tap_that_was_left_collects_no_more() -> None:
    network = SmallResNet()
    with FeatureTap(network, ("stages.0",)):
        pass
    assert not any(part._forward_hooks for part in network.modules())
