"""Images in a folder per class, read once into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .data import Data, Normalise, Split
from .data_augment import Augment
from .data_options import normalise_from
from .data_split import stratified
from .task_error import TaskError

_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
_SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
# ImageNet's constants, which most published image models were trained with.
_NORMALISE = Normalise(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_images(folder: Path, options: Mapping[str, str]) -> Data:
    """RGB images of `size` x `size` pixels (64 unless given): the shorter side is resized, the middle kept.

    Training shifts them by up to `shift` pixels (an eighth of the size) and mirrors half of them unless `flip` is 0.

    With `train`, `val` and `test` folders each is its split, and what is missing is taken from train (a tenth
    for each). Images in the train folder itself, without folders of classes, have no labels; then val and test have to
    be there. Without a train folder: 80 % train, 10 % validation, 10 % test, every class alike, by a fixed seed.

    Raises:
        TaskError: a class is empty, an image cannot be read, the images do not fit into memory.
    """
    size = _pixels("size", options.get("size", "64"), 8, 1024)
    normalise = normalise_from(options, _NORMALISE)
    shift = _pixels("shift", options.get("shift", str(size // 8)), 0, size)
    if (flip := options.get("flip", "1")) not in ("0", "1"):
        raise TaskError(f"flip={flip} is not known; allowed are flip=0 and flip=1")
    augment = Augment(shift, flip=flip == "1")
    if not (folder / "train").is_dir():
        classes = _classes(folder)
        inputs, targets = _read(folder, classes, size)
        parts = stratified(targets, (0.8, 0.1, 0.1))
        splits = [Split(inputs[part], targets[part], normalise) for part in parts]
    elif _folders(folder / "train"):
        classes = _classes(folder / "train")
        splits = _split_folders(folder, classes, size, normalise)
    else:
        classes, splits = _without_labels(folder, size, normalise)
    return Data(replace(splits[0], augment=augment), splits[1], splits[2], classes)


def _without_labels(folder: Path, size: int, normalise: Normalise) -> tuple[tuple[str, ...], list[Split]]:
    """Train images of no class, and the labelled ones beside them."""
    labelled = [_found(folder, split) for split in ("validation", "test")]
    if None in labelled:
        raise TaskError(
            f"{folder / 'train'} has no folders of classes, so its images have no labels; {folder} needs val and test "
            "with a folder for every class then"
        )
    validation, test = (part for part in labelled if part is not None)
    classes = _classes(validation)
    _check_classes(test, classes, validation)
    paths = _members(folder / "train")
    if not paths:
        raise TaskError(f"{folder / 'train'} holds no images ({' '.join(sorted(_SUFFIXES))}); add some or remove it")
    train = Split(_load(folder, paths, size), torch.zeros(len(paths), dtype=torch.int64), normalise, labelled=False)
    return classes, [train, *(Split(*_read(part, classes, size), normalise) for part in (validation, test))]


def _found(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in _SPLITS[split] if (folder / name).is_dir()), None)


def _check_classes(folder: Path, classes: tuple[str, ...], known: Path) -> None:
    unknown = sorted(set(_folders(folder)) - set(classes))
    if unknown:
        raise TaskError(f"{folder} has the class {unknown[0]!r}, which {known} does not have")


def _split_folders(folder: Path, classes: tuple[str, ...], size: int, normalise: Normalise) -> list[Split]:
    loaded: dict[str, tuple[Tensor, Tensor]] = {}
    for split in _SPLITS:
        found = _found(folder, split)
        if found is not None:
            _check_classes(found, classes, folder / "train")
            loaded[split] = _read(found, classes, size)
    missing = [split for split in _SPLITS if split not in loaded]
    inputs, targets = loaded["train"]
    parts = stratified(targets, (1 - 0.1 * len(missing), *(0.1 for _ in missing)))
    for split, part in zip(("train", *missing), parts, strict=True):
        loaded[split] = (inputs[part], targets[part])
    return [Split(*loaded[split], normalise) for split in _SPLITS]


def _pixels(key: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise TaskError(f"{key}={text} is not a number of pixels in {low}..{high}")
    return int(text)


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _classes(folder: Path) -> tuple[str, ...]:
    names = _folders(folder)
    splits = sorted(set(names) & {name for known in _SPLITS.values() for name in known})
    if splits:
        raise TaskError(f"{folder} has {splits[0]} and no train folder; add train, or one folder for every class only")
    if len(names) < 2:
        raise TaskError(f"{folder} has {len(names)} folder(s); it needs one for every class, at least 2")
    return names


def _read(folder: Path, classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    paths: list[Path] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        # A test or validation folder may lack a class.
        if not (folder / name).is_dir():
            continue
        members = _members(folder / name)
        if not members:
            raise TaskError(f"{folder / name} holds no images ({' '.join(sorted(_SUFFIXES))}); add some or remove it")
        paths += members
        targets += [label] * len(members)
    if not paths:
        raise TaskError(f"{folder} holds no images; add some, or remove it and a part of train is taken")
    return _load(folder, paths, size), torch.tensor(targets)


def _members(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("**/*") if path.suffix.lower() in _SUFFIXES)


def _load(folder: Path, paths: Sequence[Path], size: int) -> Tensor:
    _check_memory(folder, len(paths), size)
    inputs = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for index, path in enumerate(paths):
        inputs[index] = _image(path, size)
    return inputs


def _check_memory(folder: Path, count: int, size: int) -> None:
    import psutil

    needed, available = 3 * count * size * size, int(psutil.virtual_memory().available)
    if needed > available // 2:
        raise TaskError(
            f"the {count} images in {folder} need {needed / 1e9:.1f} GB at size={size}, and {available / 1e9:.1f} GB "
            "are free; use fewer images or a smaller size"
        )


def _image(path: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # a damaged image raises nearly anything
        raise TaskError(f"{path} cannot be read as an image ({error}); repair or remove it") from None
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
