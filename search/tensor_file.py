"""Tensors with a JSON note in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import share, sync_folder
from .errors import file_mistakes
from .json_text import parsed

_NOTE = "planish"


class TensorFileError(ValueError):
    """A file of tensors that cannot be read; one line says why and what to do."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, object]) -> None:
    """Replaces a file by these tensors and the note: a temporary file, fsync, rename.

    Raises:
        UserError: the disk is full or the folder is read-only.
        TypeError: the note is not JSON.
    """
    from safetensors.torch import save

    # Copies, because safetensors refuses two names for one storage, which shared parameters are.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    data = save(own, {_NOTE: json.dumps(note, allow_nan=False)})
    with file_mistakes(str(path), "free space or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            share(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: tensors by name, and the note.

    Raises:
        FileNotFoundError: there is no such file.
        TensorFileError: the file is damaged, or another program's.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            note = parsed((file.metadata() or {})[_NOTE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        reason = "it has no note of planish's" if isinstance(error, KeyError) else error
        raise TensorFileError(f"{path} cannot be read ({reason}); delete it to start afresh") from None
    if not isinstance(note, dict):
        raise TensorFileError(f"{path} has the note {note!r}, which is not an object; delete it to start afresh")
    return tensors, note
