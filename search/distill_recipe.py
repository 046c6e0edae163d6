"""How a student is trained: the loss's weights, the optimiser and its learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .distill_state import trainable
from .spec_defaults import PRECISIONS


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    The loss is `(1-a) CE + a T^2 KL(teacher|student) + b sum |A_s - A_t|^2 + c sum |F_s - F_t|^2 / |F_t|^2`.

    Attributes:
        alpha: a: 0 is training on labels alone, 1 uses no labels at all (unlabelled data).
        temperature: T.
        attention: b; 0 leaves attention transfer out.
        hints: c, of features at the ends of stages; 0 leaves hints out.
        optimiser: "sgd" (Nesterov momentum 0.9) or "adamw" (for very small networks).
        learning_rate: At its highest, after the warm-up; then it falls as a half cosine over the planned epochs.
        warmup: The share of all steps in which the learning rate rises from 0.
        weight_decay: For parameters of two dimensions and more: not biases, batch norms or scales.
        batch: Samples in a step, at most.
        clip: The largest norm of all gradients together.
        augment: Whether the split's own augmentation is used.
        precision: That convolutions and matrix products of student and teacher are computed in: "float32" or
            "bfloat16" (Kalamkar et al. 2019). Parameters, losses and the optimiser are float32 with both.
    """

    alpha: float = 0.8
    temperature: float = 4.0
    attention: float = 1.0
    hints: float = 0.0
    optimiser: str = "sgd"
    learning_rate: float = 0.02
    warmup: float = 0.05
    weight_decay: float = 5e-4
    batch: int = 64
    clip: float = 5.0
    augment: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        allowed = {
            "alpha": (0 <= self.alpha <= 1, "in 0..1"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "attention": (0 <= self.attention < math.inf, "0 or above"),
            "hints": (0 <= self.hints < math.inf, "0 or above"),
            "optimiser": (self.optimiser in ("sgd", "adamw"), "sgd or adamw"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "warmup": (0 <= self.warmup < 1, "in 0..1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or above"),
            "batch": (self.batch >= 2, "at least 2, for batch norm"),
            "clip": (self.clip > 0, "above 0"),
            "precision": (self.precision in PRECISIONS, " or ".join(PRECISIONS)),
        }
        for name, (fits, text) in allowed.items():
            if not fits:
                raise ValueError(f"recipe {name} is {getattr(self, name)!r}; it needs to be {text}")

    def described(self) -> dict[str, object]:
        """What tells a training from others; as it was when there was float32 alone, where that is used."""
        described = asdict(self)
        if self.precision == "float32":
            del described["precision"]
        return described

    def computing(self, device: torch.device) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """That of step 0, 1, ... total_steps - 1: a linear rise, then half a cosine down to 0."""
    rising = round(recipe.warmup * total_steps)
    if step < rising:
        return recipe.learning_rate * (step + 1) / (rising + 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total_steps - rising)))


def build_optimiser(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over the student's trainable parameters.

    Raises:
        ValueError: there is none.
    """
    parameters = [parameter for _, parameter in trainable(student)]
    if not parameters:
        raise ValueError("the student has no parameter with a gradient; there is nothing to train")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
