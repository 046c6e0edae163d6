"""A user's model and data in a single file, as the README shows it: digits as scikit-learn has them, 8x8.

`python own_task.py` trains the model once and writes its data; both are then found by relative paths, as users write
them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

WEIGHTS, DATA = "own.pt", "own.npz"


def data() -> tuple[tuple[object, object], ...]:
    """Train, validation and test as (inputs, targets)."""
    with np.load(DATA) as stored:
        inputs, targets = stored["inputs"], stored["targets"]
    order = np.random.default_rng(0).permutation(len(inputs))
    parts = np.split(order, [1200, 1500])
    return tuple((inputs[part], targets[part]) for part in parts)


def network() -> nn.Module:
    """Two convolutions and a linear layer, untrained."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def model() -> nn.Module:
    """The network with the weights that `train` left in the current folder."""
    net = network()
    net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return net.eval()


def train() -> None:
    """Trains for a second or two."""
    # Here and not above: it takes seconds, and every worker imports this file.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    np.savez(DATA, inputs=(images / 16).astype(np.float32).reshape(-1, 1, 8, 8), targets=labels)
    net = network()
    (inputs, targets), _, _ = data()
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets, dtype=torch.int64)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).tensor_split(len(x) // 64):
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x[batch]), y[batch]))
            optimiser.step()
    torch.save(net.state_dict(), WEIGHTS)


if __name__ == "__main__":
    train()
