from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from planish.search.data_pickle import PickleError, load_arrays
from planish.search.data_sources import load_data


class Evil:
    """Unpickled by the ordinary reader, it makes a file."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def python2(value: Any) -> bytes:
    """The value as Python 2 pickled it (the official files): str as BINSTRING, arrays through numpy.core.multiarray."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    if isinstance(value, list):
        return b"(" + b"".join(map(python2, value)) + b"l"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, dict):
        return b"(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"d"
    assert isinstance(value, np.ndarray)
    dtype = b"cnumpy\ndtype\n" + python2((value.dtype.str[1:].encode(), 0, 1)) + b"R"
    dtype += python2((3, value.dtype.str[:1].encode(), None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2(b"b") + b"tR"
    state = b"(" + python2(1) + python2(value.shape) + dtype + python2(False) + python2(value.tobytes()) + b"t"
    return empty + state + b"b"


def official(folder: Path, images: NDArray[np.uint8], labels: list[int]) -> None:
    """Writes six batches of the images in the official form: the first five share the training images."""
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {b"batch_label": b"x", b"labels": labels, b"data": images.reshape(len(images), 3072), b"filenames": []}
        (folder / name).write_bytes(b"\x80\x02" + python2(batch) + b".")


def images_and_labels(n: int = 20) -> tuple[NDArray[np.uint8], list[int]]:
    images = np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return images, [i % 10 for i in range(n)]


def test_the_official_batches_are_read_with_every_pixel_in_place(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    official(tmp_path, images, labels)
    data = load_data(f"cifar10:{tmp_path}")
    assert np.array_equal(data.test.inputs.numpy(), images)
    assert data.test.targets.tolist() == labels
    assert data.classes[9] == "truck"
    assert (len(data.train), len(data.validation)) == (90, 10)
    assert data.train.targets.bincount().tolist() == [9] * 10
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = (torch.from_numpy(images[:2]).to(torch.float32) / 255 - mean) / std
    torch.testing.assert_close(data.test.batch(slice(0, 2)), expected, atol=1e-5, rtol=0)


def test_the_unpacked_archive_folder_is_found_inside_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    official(inner, *images_and_labels())
    assert len(load_data(f"cifar10:{tmp_path}").test) == 20


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_pickled_again_by_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    images, labels = images_and_labels(3)
    file = tmp_path / "batch"
    file.write_bytes(
        pickle.dumps({"data": images.reshape(3, -1), "labels": labels, "f": np.ones(1, np.float32)}, protocol)
    )
    batch = load_arrays(file)
    assert isinstance(batch, dict)
    named = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
    assert np.array_equal(named["data"], images.reshape(3, -1))
    assert named["labels"] == labels


def test_arrays_keep_byte_order_and_column_order(tmp_path: Path) -> None:
    file = tmp_path / "arrays"
    arrays = [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3))]
    for protocol in (2, 5):
        file.write_bytes(pickle.dumps(arrays, protocol))
        read = load_arrays(file)
        assert isinstance(read, list)
        assert all(np.array_equal(a, b) for a, b in zip(read, arrays, strict=True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    official(tmp_path, *images_and_labels())
    trace = tmp_path / "it-ran"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"labels": [Evil(Path.touch, trace)]}, protocol))
    with pytest.raises(
        ValueError, match=r"data_batch_3 is not a CIFAR-10 batch: it names .*only numpy arrays"
    ) as error:
        load_data(f"cifar10:{tmp_path}")
    assert "\n" not in str(error.value)
    assert not trace.exists()
    pickle.loads((tmp_path / "data_batch_3").read_bytes())  # the same bytes do run in the ordinary reader
    assert trace.exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "evil").write_bytes(b"cbuiltins\n" + name.encode() + b"\n(S'1'\ntR.")
    with pytest.raises(PickleError, match=f"builtins.{name}"):
        load_arrays(tmp_path / "evil")


@pytest.mark.parametrize("module", ["numpy", "numpy.core.multiarray", "numpy.testing._private.utils"])
def test_other_names_of_numpy_are_refused(tmp_path: Path, module: str) -> None:
    (tmp_path / "evil").write_bytes(b"c" + module.encode() + b"\nruncode\n(S'1'\ntR.")
    with pytest.raises(PickleError, match="runcode"):
        load_arrays(tmp_path / "evil")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "objects").write_bytes(pickle.dumps(np.array([None, "x"], dtype=object)))
    with pytest.raises(PickleError, match="plain numbers"):
        load_arrays(tmp_path / "objects")


@pytest.mark.parametrize("keep", [0, 1, 100, 3000])
def test_a_batch_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    official(tmp_path, *images_and_labels())
    batch = tmp_path / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"data_batch_2.*damaged"):
        load_data(f"cifar10:{tmp_path}")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    official(tmp_path, *images_and_labels())
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(ValueError, match="lacks data_batch_4"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("batch", [[1], {b"data": 3}, {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, batch: object) -> None:
    official(tmp_path, *images_and_labels())
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="test_batch"):
        load_data(f"cifar10:{tmp_path}")


def test_a_label_outside_the_ten_classes_is_refused(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    official(tmp_path, images, [*labels[:-1], 10])
    with pytest.raises(ValueError, match=r"to 10; with 10 classes they need to be in 0\.\.9"):
        load_data(f"cifar10:{tmp_path}")


def packed(folder: Path, name: str, images: NDArray[np.uint8], labels: list[int]) -> None:
    """The filter of the packed files, written from its definition: differences up and left, then R-G and B-G."""
    planes = images.astype(np.int64)
    planes[:, 0] -= planes[:, 1]
    planes[:, 2] -= planes[:, 1]
    planes[:, :, :, 1:] -= planes[:, :, :, :-1].copy()
    planes[:, :, 1:] -= planes[:, :, :-1].copy()
    np.savez(folder / name, residual=(planes % 256).astype(np.uint8), labels=np.array(labels, np.uint8))


def test_packed_files_decode_to_the_original_pixels(tmp_path: Path) -> None:
    images, labels = images_and_labels(40)
    packed(tmp_path, "cifar10_train.npz", images, labels)
    packed(tmp_path, "cifar10_test.npz", images[::-1], labels[::-1])
    data = load_data(f"cifar10:{tmp_path}")
    assert np.array_equal(data.test.inputs.numpy(), images[::-1])
    assert data.test.targets.tolist() == labels[::-1]
    together = torch.cat([data.train.inputs, data.validation.inputs]).flatten(1).tolist()
    assert sorted(together) == sorted(images.reshape(40, -1).tolist())


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    images, labels = images_and_labels(10)
    packed(tmp_path, "cifar10_train.npz", images, labels)
    packed(tmp_path, "cifar10_test.npz", images, labels)
    file = tmp_path / "cifar10_train.npz"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cifar10_train\.npz cannot be read"):
        load_data(f"cifar10:{tmp_path}")


def test_a_packed_file_with_other_members_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_train.npz", pixels=np.zeros(3))
    np.savez(tmp_path / "cifar10_test.npz", pixels=np.zeros(3))
    with pytest.raises(ValueError, match="no member 'labels'; it has pixels"):
        load_data(f"cifar10:{tmp_path}")


def test_objects_in_a_packed_file_are_not_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    np.savez(tmp_path / "cifar10_train.npz", labels=np.array([Evil(Path.touch, trace)], dtype=object))
    np.savez(tmp_path / "cifar10_test.npz", labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"cifar10_train\.npz cannot be read"):
        load_data(f"cifar10:{tmp_path}")
    assert not trace.exists()


def test_an_empty_folder_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs data_batch_1"):
        load_data(f"cifar10:{tmp_path}")
