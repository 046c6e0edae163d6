"""Built-in models that are trained here on first use and kept in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .data import Data
from .distill import Epoch, Recipe, distill
from .score import accuracy
from .task_error import TaskError
from .tensor_file import TensorFileError, read_tensors, write_tensors

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a built-in model is trained: always from seed 0, so that every user searches from the same original."""

    epochs: int
    recipe: Recipe


def trained(name: str, make: Callable[[], nn.Module], data: Data, plan: Plan, cache: Path) -> nn.Module:
    """The trained model in eval mode: from the cache, or trained now on `data.train` and put there.

    Safe for many processes at once: one trains, the others wait and read.

    Args:
        name: The model's, for the file and the log.
        make: Returns the untrained network.

    Raises:
        TaskError: the cache folder cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
    recipe = _description(name, module, data, plan)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    path = cache / "models" / f"{name}-{digest}.safetensors"
    if _load(module, path):
        return module.eval()
    with _locked(path.with_suffix(".lock")):
        # Another process may have finished while this one waited.
        if not _load(module, path):
            _train(name, module, data, plan)
            score = accuracy(module, data.validation)
            _log.info("%s: %.2f %% of the validation samples are right; kept in %s", name, 100 * score.value, path)
            write_tensors(path, module.state_dict(), {"recipe": recipe, "validation_accuracy": score.value})
    return module.eval()


def _train(name: str, module: nn.Module, data: Data, plan: Plan) -> None:
    _log.info("training %s once: %d epochs of %d samples", name, plan.epochs, len(data.train))

    def report(epoch: Epoch) -> None:
        _log.info("%s: epoch %d of %d, loss %.3f", name, epoch.number, plan.epochs, epoch.loss)

    distill(
        module,
        None,
        data.train,
        to_epoch=plan.epochs,
        total_epochs=plan.epochs,
        seed=0,
        recipe=plan.recipe,
        on_epoch=report,
    )


def _description(name: str, module: nn.Module, data: Data, plan: Plan) -> dict[str, object]:
    """All that the trained weights depend on, as JSON."""
    digest = hashlib.sha256()
    for tensor in (data.train.inputs, data.train.targets):
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "model": name,
        "shapes": {key: list(value.shape) for key, value in module.state_dict().items()},
        "epochs": plan.epochs,
        "recipe": plan.recipe.described(),
        "normalise": asdict(data.train.normalise),
        "augment": asdict(data.train.augment),
        "data_sha256": digest.hexdigest(),
    }


def _load(module: nn.Module, path: Path) -> bool:
    if not path.exists():
        return False
    try:
        tensors, _ = read_tensors(path)
        module.load_state_dict(tensors)
    except (TensorFileError, RuntimeError) as error:
        _log.warning("%s; training it again", error)
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise TaskError(
            f"the cache {path.parent} cannot be written ({error.strerror}); set PLANISH_CACHE to a folder that can"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the end of the process releases it, however it ends
        yield
