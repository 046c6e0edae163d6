from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from planish.search.weights import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))


def filled() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {name: torch.rand_like(value.float()).to(value.dtype) for name, value in network().state_dict().items()}


def same(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: OrderedDict(w),
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": w},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
    ],
)
def test_every_usual_form_of_a_state_dict_is_read(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    torch.save(wrap(filled()), tmp_path / "w.pt")
    module = network()
    load_weights(module, tmp_path / "w.pt")
    assert same(module, filled())


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    save_file(filled(), tmp_path / name)
    module = network()
    load_weights(module, str(tmp_path / name))
    assert same(module, filled())


def test_a_file_without_counters_loads(tmp_path: Path) -> None:
    weights = {k: v for k, v in filled().items() if "num_batches" not in k}
    torch.save(weights, tmp_path / "w.pt")
    module = network()
    load_weights(module, tmp_path / "w.pt")
    assert same(module, weights)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    torch.save({"state_dict": filled(), "extra": Evil(trace)}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"pickle with code \(it names \w+\.mkdir\), which is never run; convert"
    ) as error:
        load_weights(network(), tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_plain_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil(trace), 2))
    with pytest.raises(ValueError, match="convert them"):
        load_weights(network(), tmp_path / "w.pt")
    assert not trace.exists()


def test_a_whole_saved_module_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"names torch\.nn\.modules\.\S+\).*save_file"):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("0.weight"), r"lack 0\.weight; give"),
        (lambda w: [w.pop(k) for k in list(w) if k[0] != "1"], r"lack 0\.weight, 0\.bias, 2\.weight and 1 more"),
        (lambda w: w.update({"9.weight": torch.ones(1)}), r"have the unknown 9\.weight"),
        (lambda w: w.update({"2.weight": torch.ones(3, 2)}), r"2\.weight has shape \(3, 2\) and the model's \(2, 2\)"),
        (lambda w: w["2.weight"].fill_(float("nan")), r"NaN or infinity in 2\.weight"),
        (lambda w: w.update({"2.weight": 3}), r"'2\.weight': a int, not a tensor"),
        (lambda w: w.clear(), "not names and tensors"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    weights = filled()
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_weights(module, tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    assert same(module, before)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02", b"\x00" * 40])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_weights(network(), tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_cut_short_is_one_clear_line(tmp_path: Path, name: str) -> None:
    torch.save(filled(), tmp_path / "w.pt")
    save_file(filled(), tmp_path / "w.safetensors")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=name):
        load_weights(network(), tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.pt: there is no such file"):
        load_weights(network(), tmp_path / "gone.pt")


def test_half_precision_weights_are_read_into_a_float_model(tmp_path: Path) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in filled().items()}, tmp_path / "w.pt")
    module = network()
    load_weights(module, tmp_path / "w.pt")
    assert module.state_dict()["0.weight"].dtype == torch.float32
    assert torch.equal(module.state_dict()["0.weight"], filled()["0.weight"].half().float())
