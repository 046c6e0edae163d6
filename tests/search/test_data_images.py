from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from planish.search.data_sources import load_data
from planish.search.task_error import TaskError


def image(path: Path, value: int, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(mode) if len(mode) > 1 else value).save(path)


def folder_per_class(folder: Path, count: int = 10) -> None:
    for label, name in enumerate(("ash", "birch")):
        for i in range(count):
            image(folder / name / f"{i}.png", 100 * label + i)


def test_every_image_gets_the_class_of_its_folder(tmp_path: Path) -> None:
    folder_per_class(tmp_path)
    data = load_data(f"images:{tmp_path}?size=16")
    assert data.classes == ("ash", "birch")
    assert data.shape == (3, 16, 16)
    assert [len(part) for part in data.splits().values()] == [16, 2, 2]
    seen = []
    for part in data.splits().values():
        values = part.inputs[:, 0, 0, 0].long()
        assert ((values >= 100).long() == part.targets).all()
        seen += values.tolist()
    assert sorted(seen) == [*range(10), *range(100, 110)]
    assert data.train.augment
    assert not data.validation.augment


def test_split_folders_are_kept_apart(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        folder_per_class(tmp_path / name, count)
    data = load_data(f"images:{tmp_path}?size=8")
    assert [len(part) for part in data.splits().values()] == [12, 4, 6]


def test_a_missing_validation_folder_is_taken_from_train_and_test_stays_whole(tmp_path: Path) -> None:
    folder_per_class(tmp_path / "train", 10)
    folder_per_class(tmp_path / "test", 3)
    data = load_data(f"images:{tmp_path}?size=8")
    assert [len(part) for part in data.splits().values()] == [18, 2, 6]
    train, validation = (set(part.inputs[:, 0, 0, 0].tolist()) for part in (data.train, data.validation))
    assert not train & validation


def test_train_images_without_folders_of_classes_have_no_labels(tmp_path: Path) -> None:
    for i in range(5):
        image(tmp_path / "train" / f"{i}.png", 10 * i)
    for name in ("val", "test"):
        folder_per_class(tmp_path / name, 3)
    data = load_data(f"images:{tmp_path}?size=8")
    assert (data.train.labelled, data.validation.labelled, data.test.labelled) == (False, True, True)
    assert data.train.inputs[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert data.classes == ("ash", "birch")
    assert data.train.augment


def test_without_labels_there_have_to_be_a_val_and_a_test_folder(tmp_path: Path) -> None:
    image(tmp_path / "train" / "0.png", 1)
    folder_per_class(tmp_path / "val", 3)
    with pytest.raises(TaskError, match="needs val and test with a folder for every class"):
        load_data(f"images:{tmp_path}?size=8")
    folder_per_class(tmp_path / "test", 3)
    image(tmp_path / "test" / "cedar" / "0.png", 1)
    with pytest.raises(TaskError, match="'cedar', which"):
        load_data(f"images:{tmp_path}?size=8")


def test_the_middle_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    folder_per_class(tmp_path)
    pixels = np.zeros((16, 64, 3), np.uint8)
    pixels[:, 24:40] = 200
    for i in range(10):
        Image.fromarray(pixels).save(tmp_path / "birch" / f"{i}.png")
    data = load_data(f"images:{tmp_path}?size=16")
    assert (data.train.inputs[data.train.targets == 1] == 200).all()


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("RGB", "jpg")])
def test_grey_transparent_and_jpeg_images_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    for name in ("a", "b"):
        for i in range(10):
            image(tmp_path / name / f"{i}.{suffix}", 90, mode=mode)
    data = load_data(f"images:{tmp_path}?size=8")
    # A flat image of quality 75 is off by at most one grey level.
    assert (data.train.inputs.long() - 90).abs().max() <= 1


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes) -> None:
    folder_per_class(tmp_path)
    (tmp_path / "birch" / "4.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"birch/4\.png cannot be read as an image") as error:
        load_data(f"images:{tmp_path}")
    assert "\n" not in str(error.value)


def test_an_image_cut_short_is_named(tmp_path: Path) -> None:
    folder_per_class(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = tmp_path / "ash" / "3.png"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ash/3\.png cannot be read"):
        load_data(f"images:{tmp_path}")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    folder_per_class(tmp_path)
    (tmp_path / "cedar").mkdir()
    (tmp_path / "cedar" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match="cedar holds no images"):
        load_data(f"images:{tmp_path}")


def test_one_class_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "only" / "1.png", 3)
    with pytest.raises(ValueError, match=r"has 1 folder\(s\); it needs one for every class"):
        load_data(f"images:{tmp_path}")


def test_a_test_folder_without_train_is_not_a_class(tmp_path: Path) -> None:
    folder_per_class(tmp_path / "test")
    folder_per_class(tmp_path / "val")
    with pytest.raises(ValueError, match="has test and no train folder"):
        load_data(f"images:{tmp_path}")


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    folder_per_class(tmp_path / "train")
    folder_per_class(tmp_path / "test")
    image(tmp_path / "test" / "cedar" / "1.png", 3)
    with pytest.raises(ValueError, match="has the class 'cedar'"):
        load_data(f"images:{tmp_path}")


def test_a_test_folder_that_lacks_a_class_keeps_the_numbers_of_train(tmp_path: Path) -> None:
    for name in ("train", "val"):
        folder_per_class(tmp_path / name)
    image(tmp_path / "test" / "birch" / "1.png", 100)
    data = load_data(f"images:{tmp_path}?size=8")
    assert data.test.targets.tolist() == [1]


@pytest.mark.parametrize("size", ["0", "x", "4096", "-8", "8.5"])
def test_a_size_that_makes_no_sense_is_refused(tmp_path: Path, size: str) -> None:
    folder_per_class(tmp_path)
    with pytest.raises(ValueError, match=r"pixels in 8\.\.1024"):
        load_data(f"images:{tmp_path}?size={size}")


def test_training_images_move_as_they_may(tmp_path: Path) -> None:
    folder_per_class(tmp_path)
    usual = load_data(f"images:{tmp_path}?size=16").train.augment
    assert (usual.shift, usual.flip) == (2, True)
    still = load_data(f"images:{tmp_path}?size=16&shift=0&flip=0").train.augment
    assert not still
    with pytest.raises(TaskError, match="flip=yes is not known; allowed are flip=0 and flip=1"):
        load_data(f"images:{tmp_path}?flip=yes")
