from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from planish.search.data import Data, Normalise, Split
from planish.search.data_augment import Augment
from planish.search.data_split import stratified


def split(n: int = 6, shape: tuple[int, ...] = (2, 3, 3), classes: int = 3) -> Split:
    inputs = torch.arange(n * shape[0] * shape[1] * shape[2]).reshape(n, *shape).to(torch.uint8)
    return Split(inputs, torch.arange(n) % classes)


def data(**changes: Split) -> Data:
    return Data(**{"train": split(), "validation": split(), "test": split(), **changes}, classes=("a", "b", "c"))


def test_a_batch_is_scaled_then_centred_then_divided() -> None:
    normalise = Normalise(0.5, (1.0, 2.0), (4.0, 8.0))
    part = replace(split(), normalise=normalise)
    raw = part.inputs.to(torch.float64)
    expected = torch.stack([(raw[:, 0] * 0.5 - 1) / 4, (raw[:, 1] * 0.5 - 2) / 8], 1)
    batch = part.batch(slice(0, 6))
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch.to(torch.float64), expected, atol=1e-6, rtol=0)


def test_preprocessing_tells_how_to_make_the_batch() -> None:
    part = replace(split(), normalise=Normalise(0.5, (1.0,), (4.0,)))
    told = data(train=part, validation=part, test=part).preprocessing
    assert told["layout"] == "NCHW"
    assert told["input_shape"] == [2, 3, 3]
    assert (told["stored_dtype"], told["scale"], told["mean"], told["std"]) == ("uint8", 0.5, [1.0], [4.0])


def test_batches_cover_every_sample_once_in_order() -> None:
    part = split(7)
    pieces = list(part.batches(3))
    assert [len(targets) for _, targets in pieces] == [3, 3, 1]
    assert torch.equal(torch.cat([targets for _, targets in pieces]), part.targets)
    assert torch.equal(torch.cat([inputs for inputs, _ in pieces]), part.batch(slice(0, 7)))


def test_a_smaller_sample_is_a_prefix_of_a_larger_one_and_inputs_stay_with_targets() -> None:
    part = Split(torch.arange(100.0)[:, None], torch.arange(100))
    small, large = part.sample(10), part.sample(60)
    assert torch.equal(large.targets[:10], small.targets)
    assert torch.equal(large.inputs[:, 0].to(torch.int64), large.targets)
    # Sorted data must not give a sample of the first classes only.
    assert large.targets.max() > 80
    assert torch.equal(part.sample(None).targets, part.targets)
    assert len(part.sample(1000)) == 100


def test_a_sample_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="sample of 0"):
        split().sample(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": Split(torch.zeros(0, 2, 3, 3), torch.zeros(0, dtype=torch.int64))}, "test inputs.*empty"),
        ({"validation": Split(torch.zeros(2, 2, 4, 3), torch.zeros(2, dtype=torch.int64))}, "validation.*one shape"),
        ({"train": Split(torch.zeros(2, 2, 3, 3), torch.zeros(3, dtype=torch.int64))}, "2 inputs and 3 targets"),
        ({"train": Split(torch.zeros(2, 2, 3, 3), torch.tensor([0, 3]))}, r"from 0 to 3.*0\.\.2"),
        ({"train": Split(torch.zeros(2, 2, 3, 3), torch.tensor([-1, 0]))}, "from -1 to 0"),
        ({"train": Split(torch.zeros(2, 2, 3, 3), torch.tensor([0.0, 1.0]))}, "train targets are torch.float32"),
        ({"train": Split(torch.zeros(2, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 1]))}, "float64"),
        ({"train": Split(torch.zeros(2), torch.tensor([0, 1]))}, r"need \(samples, \.\.\.\)"),
        ({"train": replace(split(), normalise=Normalise(1.0, (0.0,) * 3, (1.0,) * 3))}, "mean has 3 numbers"),
        ({"test": replace(split(), normalise=Normalise(2.0))}, "test split is normalised"),
        ({"train": replace(split(), augment=Augment(shift=4))}, r"shift 4 is outside 0\.\.3"),
    ],
)
def test_data_that_cannot_be_used_is_refused(changes: dict[str, Split], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        data(**changes)
    assert "\n" not in str(error.value)


def test_a_nan_is_found_and_its_sample_named() -> None:
    inputs = torch.zeros(4, 2, 3, 3)
    inputs[2, 1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"validation inputs hold NaN.*1 samples.*index 2"):
        data(validation=Split(inputs, torch.tensor([0, 1, 2, 0])))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Data(split(classes=1), split(classes=1), split(classes=1), ("only",))


@pytest.mark.parametrize(
    "arguments",
    [(1.0, (0.0,), (0.0,)), (1.0, (0.0,), (1.0, 1.0)), (0.0, (0.0,), (1.0,)), (1.0, (float("nan"),), (1.0,))],
)
def test_a_normalisation_that_divides_by_zero_or_does_not_fit_is_refused(
    arguments: tuple[float, tuple[float, ...], tuple[float, ...]],
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (two messages)
        Normalise(*arguments)


def test_every_moved_image_is_one_of_the_possible_shifts_and_mirrors() -> None:
    images = torch.randint(1, 255, (64, 2, 5, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    moved = Augment(shift=2, flip=True, fill=7)(images, torch.Generator().manual_seed(2))
    assert moved.shape == images.shape
    padded = functional.pad(images, (2, 2, 2, 2), value=7)
    seen = set()
    for image, result in zip(padded, moved, strict=True):
        options = {
            (down, right, mirrored): crop.flip(2) if mirrored else crop
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
            for crop in [image[:, down : down + 5, right : right + 6]]
        }
        matches = [key for key, crop in options.items() if torch.equal(crop, result)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(5))
    assert any(down != right for down, right, _ in seen)
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_augmentation_depends_on_the_generator_only() -> None:
    part = replace(split(), augment=Augment(shift=1, flip=True))
    first = part.training_batch(torch.arange(6), torch.Generator().manual_seed(3))
    torch.rand(5)
    assert torch.equal(first, part.training_batch(torch.arange(6), torch.Generator().manual_seed(3)))
    assert torch.equal(part.batch(torch.arange(6)), part.inputs.to(torch.float32))


def test_calibration_inputs_are_moved_training_inputs_each_at_most_once() -> None:
    images = torch.zeros(20, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 1] = torch.arange(1, 21)
    part = replace(Split(images, torch.arange(20) % 2), augment=Augment(shift=1))
    inputs = part.calibration(15)
    brightest = inputs.flatten(1).max(1).values
    assert len(set(brightest.tolist())) == 15
    assert (inputs[:, 0, 1, 1] != brightest).any()
    assert torch.equal(inputs, part.calibration(15))
    assert not torch.equal(inputs, part.calibration(15, seed=1))
    assert len(part.calibration(100)) == 20


def test_a_stratified_split_gives_every_class_its_share_and_every_sample_once() -> None:
    targets = torch.arange(1000) % 7
    parts = stratified(targets, (0.6, 0.3, 0.1))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    for part, share in zip(parts, (0.6, 0.3, 0.1), strict=True):
        wanted = share * targets.bincount()
        # What is owed is carried from class to class, at most one sample each way.
        assert ((targets[part].bincount() - wanted).abs() <= 2).all()
        assert abs(len(part) - share * 1000) <= 1


def test_classes_of_four_still_fill_a_tenth() -> None:
    targets = torch.arange(40) % 10
    assert [len(part) for part in stratified(targets, (0.9, 0.1))] == [36, 4]


def test_a_stratified_split_ignores_the_global_seed() -> None:
    targets = torch.arange(50) % 5
    torch.manual_seed(1)
    first = stratified(targets, (0.5, 0.5))
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, stratified(targets, (0.5, 0.5)), strict=True))
