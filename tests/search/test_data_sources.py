from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from planish.search.data_sources import SOURCES, load_data


def test_digits_are_all_there_apart_and_shrink_back_to_the_originals() -> None:
    data = load_data("digits32")
    assert [len(part) for part in data.splits().values()] == [1078, 360, 359]
    assert data.shape == (1, 32, 32)
    inputs = torch.cat([part.inputs for part in data.splits().values()]).to(torch.float64) / 255 * 16
    # The four middle pixels of each 4x4 tile lie around the original pixel's centre.
    tiles = inputs.reshape(-1, 8, 4, 8, 4)[:, :, 1:3, :, 1:3].mean((2, 4)).flatten(1)
    originals = torch.from_numpy(load_digits().data)
    nearest = torch.cdist(tiles, originals).argmin(1)
    assert len(set(nearest.tolist())) == 1797
    targets = torch.cat([part.targets for part in data.splits().values()])
    assert torch.equal(torch.from_numpy(load_digits().target)[nearest], targets)
    assert data.example(1078).mean().abs() < 0.01
    assert (data.example(1078).std() - 1).abs() < 0.01


def test_the_splits_of_the_digits_never_change() -> None:
    # Every cached teacher was trained on this split: a change would show it the validation samples.
    data = load_data("digits32")
    assert data.validation.targets[:12].tolist() == [2, 5, 1, 4, 2, 9, 6, 6, 3, 7, 4, 0]


def write_kws(folder: Path, n: int = 60) -> None:
    features = np.random.default_rng(0).integers(-128, 128, (n, 49, 10)).astype(np.int8)
    np.savez(folder / "kws01_features.npz", mfcc_int8=features, labels=(np.arange(n) % 12).astype(np.uint8))


def test_keyword_features_are_scaled_as_the_network_was_trained(tmp_path: Path) -> None:
    write_kws(tmp_path)
    data = load_data(f"kws:{tmp_path}")
    assert [len(part) for part in data.splits().values()] == [36, 12, 12]
    expected = (data.train.inputs.to(torch.float64) - 83) * 0.5847029
    torch.testing.assert_close(data.example(36).to(torch.float64), expected, atol=1e-4, rtol=0)


def test_a_missing_keyword_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no kws01_features\.npz"):
        load_data(f"kws:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "needs a folder; write cifar10:DIR"),
        ("digits32:here", "takes no folder"),
        ("digit32", "did you mean 'digits32'"),
        ("cifar:there", "did you mean 'cifar10'"),
        ("", "known are"),
        ("cifar10:/no/such/folder", "/no/such/folder is not a folder"),
        ("digits32?size=3", "'size=3'; allowed: none"),
        ("images:{folder}?sise=64", "'sise=64'; allowed: mean=..., std=..., size=..."),
        ("images:{folder}?size", "'size'; allowed"),
        ("images:{folder}?mean=a,b", "mean=a,b is not numbers"),
        ("images:{folder}?mean=0.1,0.2", "mean has 2 numbers and std 3"),
        ("images:{folder}?std=0,0,0", "scale and std are finite and above 0"),
    ],
)
def test_a_name_that_names_no_data_says_what_is_allowed(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared as a text below)
        load_data(name.format(folder=tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_source_is_listed_with_a_description() -> None:
    assert set(SOURCES) == {"digits32", "cifar10", "fashion-mnist", "kws", "images"}
    assert all(source.description for source in SOURCES.values())
