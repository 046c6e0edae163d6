"""The data of a task: three splits that are kept apart, stored compactly, normalised batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from .data_augment import Augment
from .task_error import TaskError

# Scores of single samples: (outputs (n, ...), targets (n,)) to (n,) bool or float in [0, 1], more is better.
Metric = Callable[[Tensor, Tensor], Tensor]

_DTYPES = (torch.uint8, torch.int8, torch.float32)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the largest of a sample's logits is its class: (n, classes) and (n,) to bool (n,)."""
    return outputs.argmax(1) == targets


@dataclass(frozen=True)
class Normalise:
    """`(x * scale - mean) / std`, mean and std one number for all, or one for each of a sample's first dimension."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise TaskError(f"mean has {len(self.mean)} numbers and std {len(self.std)}; they need as many, at least 1")
        numbers = torch.tensor([self.scale, *self.mean, *self.std])
        if not bool(numbers.isfinite().all()) or min(self.std) <= 0 or self.scale <= 0:
            raise TaskError(f"{self} is not usable; scale and std are finite and above 0, mean is finite")

    def __call__(self, raw: Tensor) -> Tensor:
        """(n, ...) of any of the stored types to float32, same shape."""
        if self == Normalise():
            return raw.to(torch.float32)
        mean, std = (_column(numbers, raw.ndim, raw.device) for numbers in (self.mean, self.std))
        return (raw.to(torch.float32) * self.scale - mean) / std


@cache
def _column(numbers: tuple[float, ...], dimensions: int, device: torch.device) -> Tensor:
    """The numbers along the second of so many dimensions; kept, because a GPU would wait for them in every step."""
    return torch.tensor(numbers, device=device).reshape((-1,) + (1,) * (dimensions - 2))


@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their classes.

    Attributes:
        inputs: Shape (n, ...), uint8, int8 or float32, as stored; `batch` returns what the model takes.
        targets: Shape (n,), int64 classes.
        normalise: What `batch` does to the stored inputs.
        augment: How training may move the inputs; evaluation never does.
        metric: What an output is worth; `accuracy` unless the user brought another.
        labelled: False where nobody knows the classes: the targets are 0, and only a teacher can be learned from.
    """

    inputs: Tensor
    targets: Tensor
    normalise: Normalise = field(default_factory=Normalise)
    augment: Augment = field(default_factory=Augment)
    metric: Metric = accuracy
    labelled: bool = True

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.inputs.shape[1:])

    def batch(self, indices: Tensor | Sequence[int] | slice) -> Tensor:
        """The normalised inputs of some samples, float32, shape (len(indices), ...)."""
        return self.normalise(self.inputs[indices])

    def training_batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """`batch`, moved at random as `augment` says; draws from `generator` only."""
        return self.normalise(self.augment(self.inputs[indices], generator))

    def calibration(self, count: int, seed: int = 0) -> Tensor:
        """`count` inputs (at most all) as training sees them, augmented: what batch-norm statistics are estimated on.

        Estimated on the bare images instead, the statistics of a network that was trained on shifted ones are
        off: ResNet-20 on CIFAR-10 falls from 0.915 to 0.885, and stays at 0.917 with these.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return self.training_batch(chosen, generator)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) of all samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.batch(part), self.targets[part]

    def sample(self, count: int | None) -> Split:
        """At most `count` samples in a shuffled order that is the same in every process.

        A smaller count is a prefix of a larger one, so scores of the same model on more samples are
        comparable. None is the whole split in its own order.
        """
        if count is None:
            return self
        if count < 1:
            raise TaskError(f"a sample of {count} was asked for; ask for at least 1, or None for all {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]
        return self.take(order)

    def to(self, device: torch.device) -> Split:
        """The split with its samples on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def take(self, indices: Tensor) -> Split:
        """The split of these samples, in this order."""
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices])


@dataclass(frozen=True, eq=False)
class Data:
    """Train, validation and test samples; a search reads the first two, and the test split is for one last report.

    Raises:
        TaskError: a split is empty or of the wrong type or shape, a label is outside the classes, a value is NaN.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise TaskError(f"the data has {len(self.classes)} class(es) {list(self.classes)}; it needs at least 2")
        for name, split in self.splits().items():
            _check(name, split, len(self.classes))
            if not split.labelled and name != "train":
                raise TaskError(f"the {name} split has no labels; only train can do without them")
            if split.shape != self.train.shape:
                raise TaskError(
                    f"the {name} inputs have shape {split.shape} and the train inputs {self.train.shape}; "
                    "all splits need one shape"
                )
            if split.normalise != self.train.normalise:
                raise TaskError(f"the {name} split is normalised by {split.normalise}, train by {self.train.normalise}")

    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.train.shape

    def example(self, count: int = 1) -> Tensor:
        """The first `count` normalised training inputs, shape (count, ...)."""
        return self.train.batch(slice(0, count))

    @property
    def preprocessing(self) -> Mapping[str, object]:
        """What turns a stored sample into the model's input, as JSON: an artifact carries it along."""
        letters = {1: "F", 2: "CL", 3: "CHW", 4: "CDHW"}
        normalise = self.train.normalise
        return {
            "layout": "N" + letters.get(len(self.shape), "?"),
            "input_shape": list(self.shape),
            "stored_dtype": str(self.train.inputs.dtype).removeprefix("torch."),
            "formula": "(x * scale - mean) / std",
            "scale": normalise.scale,
            "mean": list(normalise.mean),
            "std": list(normalise.std),
            "classes": list(self.classes),
        }


def _check(name: str, split: Split, classes: int) -> None:
    inputs, targets = split.inputs, split.targets
    if inputs.ndim < 2:
        raise TaskError(f"the {name} inputs have shape {tuple(inputs.shape)}; they need (samples, ...)")
    if inputs.dtype not in _DTYPES:
        raise TaskError(f"the {name} inputs are {inputs.dtype}; they need to be uint8, int8 or float32")
    if targets.ndim != 1 or targets.dtype != torch.int64:
        raise TaskError(
            f"the {name} targets are {targets.dtype} of shape {tuple(targets.shape)}; "
            "they need to be int64 classes of shape (samples,)"
        )
    if len(inputs) != len(targets):
        raise TaskError(f"the {name} split has {len(inputs)} inputs and {len(targets)} targets; it needs as many")
    if inputs.numel() == 0:
        raise TaskError(f"the {name} inputs have shape {tuple(inputs.shape)}: empty; every split needs samples")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise TaskError(
            f"the {name} targets go from {low} to {high}; with {classes} classes they need to be in 0..{classes - 1}"
        )
    bad = ~inputs.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        raise TaskError(
            f"the {name} inputs hold NaN or infinity in {int(bad.sum())} samples, first at index "
            f"{int(bad.nonzero()[0])}; remove or repair them"
        )
    channels = len(split.normalise.mean)
    if channels not in (1, inputs.shape[1]):
        raise TaskError(f"the {name} inputs have {inputs.shape[1]} channels and mean has {channels} numbers")
    split.augment.check(split.shape)
