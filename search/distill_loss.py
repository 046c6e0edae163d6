"""The loss of a student: labels, the teacher's softened logits, attention maps and features, weighted by the recipe."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .distill_attention import attention_loss, attention_map, hint_loss
from .distill_recipe import Recipe
from .distill_teacher import Targets


def losses(
    recipe: Recipe,
    logits: Tensor,
    features: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    targets: Tensor,
    wanted: Targets | None,
) -> Tensor:
    """(loss, ce, kl, attention, hints), shape (5,), the parts before their weights.

    Args:
        recipe: The weights.
        logits: The student's, shape (n, classes).
        features: The student's, each (n, c, h, w): those whose attention maps are compared, and those that have hints.
        targets: Classes, shape (n,); not read if alpha is 1.
        wanted: What the teacher says; None without a teacher.

    Raises:
        ValueError: student and teacher have different classes.
    """
    zero = logits.new_zeros(())
    ce = functional.cross_entropy(logits, targets) if recipe.alpha < 1 else zero
    kl, attention, hints = zero, zero, zero
    if wanted is not None and recipe.alpha > 0:
        if logits.shape != wanted.logits.shape:
            raise ValueError(
                f"the student returns {tuple(logits.shape)} and the teacher {tuple(wanted.logits.shape)}; "
                "they need the same classes"
            )
        kl = softened_kl(logits, wanted.logits, recipe.temperature)
    seen, hinted = features
    if wanted is not None and seen:
        attention = attention_loss([attention_map(feature) for feature in seen], wanted.maps)
    if wanted is not None and hinted:
        hints = hint_loss(hinted, wanted.features)
    loss = (1 - recipe.alpha) * ce + recipe.alpha * kl + recipe.attention * attention + recipe.hints * hints
    return torch.stack((loss, ce, kl, attention, hints))


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher | student) of logits (n, classes) divided by T, the mean over samples (Hinton et al. 2015)."""
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
