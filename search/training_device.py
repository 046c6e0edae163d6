"""What candidates are trained on: a CUDA GPU where there is one, else the CPU."""

from __future__ import annotations

import math

import torch

from .errors import UserError

# Trainings that share one GPU: small networks leave most of it idle, more of them only wait for each other.
_PER_GPU = 8


def gpus_here(wanted: str) -> int:
    """CUDA GPUs of this machine that training may use.

    Args:
        wanted: `distill.device` of the specification: auto, cpu or cuda.

    Raises:
        UserError: it is cuda, and torch finds none.
    """
    count = 0 if wanted == "cpu" else torch.cuda.device_count()
    if wanted == "cuda" and not count:
        raise UserError(f"{_missing()}; a CPU build of torch finds none either")
    return count


def gpu_share(wanted: str, gpus: float, trainings: int) -> float:
    """The part of a GPU that each of so many simultaneous trainings gets; 0 where they use the CPU.

    Args:
        wanted: As for `gpus_here`.
        gpus: Of the Ray cluster.
        trainings: At once, at least 1.

    Raises:
        UserError: `wanted` is cuda, and the cluster has no GPU.
    """
    if wanted == "cpu" or gpus < 1:
        if wanted == "cuda":
            raise UserError(f"{_missing()} among the nodes of the Ray cluster")
        return 0.0
    slots = min(_PER_GPU, math.ceil(trainings / int(gpus)))
    # Ray counts in parts of ten thousand.
    return math.floor(1e4 / slots) / 1e4


def device_for(wanted: str, assigned: bool) -> torch.device:
    """The device of a process.

    Args:
        wanted: As for `gpus_here`.
        assigned: Whether the process was given a part of a GPU.

    Raises:
        UserError: `wanted` is cuda, and torch cannot use one.
    """
    if wanted != "cpu" and assigned and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise UserError(f"{_missing()} in a training process")
    return torch.device("cpu")


def _missing() -> str:
    return 'distill.device = "cuda" and there is no CUDA GPU that torch can use; give "auto" or "cpu", or add one'
