"""A user's model and data in a single file, as the README shows it: digits as scikit-learn has them, 8x8."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def data() -> tuple[tuple[object, object], ...]:
    """Train, validation and test as (inputs, targets)."""
    images, targets = load_digits(return_X_y=True)
    inputs = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(inputs))
    parts = np.split(order, [1200, 1500])
    return tuple((inputs[part], targets[part]) for part in parts)


def model() -> nn.Module:
    """Two convolutions and a linear layer, trained here for a second or two."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    (inputs, targets), _, _ = data()
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets, dtype=torch.int64)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).tensor_split(len(x) // 64):
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x[batch]), y[batch]))
            optimiser.step()
    return net.eval()
