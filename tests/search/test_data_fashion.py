from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from planish.search.data_sources import load_data
from planish.search.task_error import TaskError

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx(values: NDArray[np.uint8]) -> bytes:
    """The IDX form (LeCun): two zero bytes, 08 for bytes, the dimensions, big-endian sizes, the values."""
    return struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def arrays(n: int = 40) -> dict[str, NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    labels = (np.arange(n) % 10).astype(np.uint8)
    images = [rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for _ in range(2)]
    return {"train_images": images[0], "train_labels": labels, "test_images": images[1], "test_labels": labels[::-1]}


def write(folder: Path, packed: bool = False) -> dict[str, NDArray[np.uint8]]:
    given = arrays()
    for key, values in given.items():
        name = NAMES[key] + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return given


@pytest.mark.parametrize("packed", [False, True])
def test_official_files_are_read_with_every_pixel_in_place(tmp_path: Path, packed: bool) -> None:
    given = write(tmp_path, packed)
    data = load_data(f"fashion-mnist:{tmp_path}")
    assert np.array_equal(data.test.inputs[:, 0].numpy(), given["test_images"])
    assert data.test.targets.tolist() == given["test_labels"].tolist()
    assert (len(data.train), len(data.validation), data.shape) == (36, 4, (1, 28, 28))
    together = {image.tobytes() for part in (data.train, data.validation) for image in part.inputs.numpy()}
    assert together == {image.tobytes() for image in given["train_images"]}


def test_the_packed_file_gives_the_same_data(tmp_path: Path) -> None:
    given = write(tmp_path)
    other = tmp_path / "packed"
    other.mkdir()
    np.savez(other / "fashion_mnist_small.npz", **given)  # type: ignore[arg-type]
    official, packed = load_data(f"fashion-mnist:{tmp_path}"), load_data(f"fashion-mnist:{other}")
    for a, b in zip(official.splits().values(), packed.splits().values(), strict=True):
        assert a.inputs.equal(b.inputs)
        assert a.targets.equal(b.targets)


def test_mean_and_std_of_the_name_replace_the_usual_ones(tmp_path: Path) -> None:
    write(tmp_path)
    data = load_data(f"fashion-mnist:{tmp_path}?mean=0.5&std=0.25")
    raw = data.train.inputs[:1].double() / 255
    assert (data.example().double() - (raw - 0.5) / 0.25).abs().max() < 1e-5


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / NAMES["train_images"]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte has 31355 values.*cut short"):
        load_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("keep", [4, 200])
def test_a_packed_official_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, packed=True)
    file = tmp_path / (NAMES["test_labels"] + ".gz")
    file.write_bytes(file.read_bytes()[: min(keep, file.stat().st_size - 4)])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz cannot be unpacked"):
        load_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize("start", [b"", b"\x00\x00\x0d\x03", b"\x1f\x8b"])
def test_a_file_of_another_form_is_named(tmp_path: Path, start: bytes) -> None:
    write(tmp_path)
    (tmp_path / NAMES["test_images"]).write_bytes(start)
    with pytest.raises(ValueError, match="begins with 00 00 08 03"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / NAMES["test_labels"]).unlink()
    with pytest.raises(ValueError, match="lacks the test_labels"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_more_labels_than_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / NAMES["test_labels"]).write_bytes(idx(np.zeros(41, np.uint8)))
    with pytest.raises(ValueError, match="40 inputs and 41 targets"):
        load_data(f"fashion-mnist:{tmp_path}")


def test_validation_can_come_from_test_and_leaves_all_of_train(tmp_path: Path) -> None:
    given = write(tmp_path)
    data = load_data(f"fashion-mnist:{tmp_path}?validation=test")
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 20, 20)
    assert {i.tobytes() for i in data.train.inputs.numpy()} == {i.tobytes() for i in given["train_images"]}
    parts = [{i.tobytes() for i in part.inputs.numpy()} for part in (data.validation, data.test)]
    assert parts[0] | parts[1] == {i.tobytes() for i in given["test_images"]}
    assert not parts[0] & parts[1]
    assert data.test.targets.bincount().tolist() == [2] * 10


def test_another_source_of_validation_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(TaskError, match="validation=both is not known; allowed are validation=train and"):
        load_data(f"fashion-mnist:{tmp_path}?validation=both")
