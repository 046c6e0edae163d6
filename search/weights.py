"""Weights from files, without running what is in them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .task_error import TaskError

_PREFIXES = ("module.", "_orig_mod.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Copies a file's weights into the module, all of them or none.

    Args:
        path: safetensors, or a state dict saved by torch (on its own, or under "state_dict" or "model"). The prefix
            that `DataParallel` and `torch.compile` add to every name is taken off.

    Raises:
        TaskError: the file is missing or damaged, would have to run code to load, or does not fit the module.
    """
    path = Path(os.path.expanduser(path))
    weights = _strip(read_weights(path))
    own = module.state_dict()
    _check_names(path, own, weights)
    _check_values(path, own, weights)
    module.load_state_dict(weights, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, with no prefix taken off.

    Raises:
        TaskError: the file is missing or damaged, or would have to run code to load.
    """
    if not path.is_file():
        raise TaskError(f"weights {path}: there is no such file; give the path of a .safetensors or .pt file")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _unwrap(path, _read_torch(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise TaskError(f"weights {path} are not a whole safetensors file ({error}); copy the file again") from None


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise TaskError(f"weights {path} are not a file that torch wrote; {_CONVERT}") from None
        raise TaskError(
            f"weights {path} are a pickle with code (it names {named[1]}), which is never run; {_CONVERT}"
        ) from None
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(f"weights {path} cannot be read ({reason}); {_CONVERT}") from None


_CONVERT = "convert them where they come from: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"


def _unwrap(path: Path, loaded: object) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise TaskError(f"weights {path} hold a {type(loaded).__name__}, not names and tensors; {_CONVERT}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TaskError(f"weights {path} hold {name!r}: a {type(value).__name__}, not a tensor; {_CONVERT}")
    return dict(loaded)


def _strip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return weights


def _check_names(path: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    # Files older than torch 0.4.1 have no counters, and no forward pass with fixed momentum reads them.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    if missing or unexpected:
        parts = [_some("lack", missing)] * bool(missing) + [_some("have the unknown", unexpected)] * bool(unexpected)
        raise TaskError(
            f"weights {path} do not fit the model: they {' and '.join(parts)}; give the weights of this model"
        )
    for name in own.keys() & weights.keys():
        have, want = tuple(weights[name].shape), tuple(own[name].shape)
        if have != want:
            raise TaskError(
                f"weights {path} do not fit the model: {name} has shape {have} and the model's {want}; "
                "give the weights of this model"
            )


def _check_values(path: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if name in own and value.is_floating_point() and not bool(value.isfinite().all()):
            raise TaskError(
                f"weights {path} hold NaN or infinity in {name}; they were damaged in training or in copying"
            )


def _some(verb: str, names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{verb} {', '.join(names[:shown])}{rest}"
