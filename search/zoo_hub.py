"""Models from timm and from Hugging Face transformers, where those are installed."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from .task_error import TaskError


class LogitsOf(nn.Module):
    """A transformers classifier that takes an image tensor and returns the logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, classes)."""
        return self.model(pixel_values=x).logits  # type: ignore[no-any-return]


def load_timm(name: str, pretrained: bool) -> nn.Module:
    """A timm model; pretrained weights come from the local Hugging Face cache, or else are downloaded.

    Raises:
        TaskError: timm is not installed, does not know the name, or cannot get the weights.
    """
    timm = _library("timm", f"timm:{name}")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "see timm.list_models()"
        raise TaskError(f"model 'timm:{name}' is unknown to timm {timm.__version__}; near: {near}")
    overlay = {"file": local} if pretrained and (local := _cached_timm_file(timm, name)) else None
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub's own errors are of many libraries
        raise TaskError(f"model 'timm:{name}' cannot be loaded: {_line(error)}; give its weights as a file") from error
    return model


def load_hugging_face(name: str) -> nn.Module:
    """An image classifier of transformers: a local folder, the local cache, or else downloaded; safetensors only.

    Raises:
        TaskError: transformers is not installed, or the model cannot be had.
    """
    classifier = _library("transformers", f"hf:{name}").AutoModelForImageClassification
    try:
        try:
            model = classifier.from_pretrained(name, local_files_only=True, use_safetensors=True)
        except OSError:
            model = classifier.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # the hub's own errors are of many libraries
        raise TaskError(f"model 'hf:{name}' cannot be loaded: {_line(error)}") from error
    return LogitsOf(model)


def _cached_timm_file(timm: Any, name: str) -> str | None:
    config = timm.get_pretrained_cfg(name)
    hub = getattr(config, "hf_hub_id", None)
    if not hub:
        return None
    found = _library("huggingface_hub", f"timm:{name}").try_to_load_from_cache(hub, "model.safetensors")
    return found if isinstance(found, str) else None


def _library(name: str, model: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"model {model!r} needs {name} ({_line(error)}); pip install {name}") from None
    except Exception as error:  # such as a torchvision that was built for another torch
        raise TaskError(f"model {model!r} needs {name}, which does not start here: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
