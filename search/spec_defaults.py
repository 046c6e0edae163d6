"""The keys of a search's specification: type, range, default, and what the presets fill in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .objective import METRIC_KEYS

Value = str | int | float | tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """A key of the specification, `table.key` or `key`.

    Kinds: `text`, `texts` (a text alone stands for a list of one), `integer`, `number`, `integers`.
    `default` None: the presets fill it in, or (with `required`) the user must.
    """

    kind: Literal["text", "texts", "integer", "number", "integers"]
    help: str
    default: Value | None = None
    low: float = 0
    high: float = math.inf
    allowed: tuple[str, ...] = ()
    required: bool = False


TRAINING_DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "bfloat16")
PRESETS = ("quick", "default", "thorough")
SAMPLERS = ("planish", "grid", "random", "nsga2", "nsga3", "tpe", "gp", "dp", "netadapt")
LATENCIES = ("measured", "predicted")
# The values of spaces.Kind, which is not imported here: reading a specification must not load torch.
FAMILIES = ("block", "prune", "rank", "cluster", "bits")

KEYS: Mapping[str, Key] = {
    "model": Key("text", "built-in name, package.module:factory, file.py:factory, hf:NAME or timm:NAME", required=True),
    "weights": Key("text", "state dict (.pt or .safetensors); empty: the model's own", ""),
    "data": Key("text", "built-in name, cifar10:DIR, fashion-mnist:DIR, images:DIR or file.py:factory", required=True),
    "device": Key("texts", "a name (`planish devices`), a TOML file or rpc://host:port/key; several: a list", ("cpu",)),
    "budget": Key("texts", "what a result must keep, for instance latency<=0.5x; several: a list", ()),
    "objectives": Key("texts", "what is traded off", ("accuracy", "latency"), allowed=tuple(METRIC_KEYS)),
    "preset": Key("text", "how long to search", "default", allowed=PRESETS),
    "workers": Key("integer", "processes that evaluate; 0: one per core", 0, high=4096),
    "seed": Key("integer", "of every random choice", 0, high=2**31 - 1),
    "sampler": Key("text", "what proposes candidates", "planish", allowed=SAMPLERS),
    "address": Key("text", "Ray cluster; local: this machine", "local"),
    "search.trials": Key("integer", "candidates that are scored", low=1, high=10**6),
    "search.batch": Key("integer", "candidates proposed at a time (the result depends on it)", low=1, high=10**4),
    "search.ahead": Key(
        "integer", "batches that begin before an earlier one is told; above 0 for hundreds of workers", 0, high=10**4
    ),
    "search.proxy_images": Key("integer", "images that the one-shot score looks at", low=16, high=10**7),
    "space.families": Key("texts", "compression families", FAMILIES, allowed=FAMILIES),
    "space.lanes": Key("integer", "channels per vector that widths are rounded to; 0: the device's", 0, high=1024),
    "distill.rungs": Key("integers", "epochs so far at the end of every rung, rising", low=1, high=10**5),
    "distill.survivors": Key("integers", "candidates that enter every rung, not rising", low=1, high=10**5),
    "distill.learning_rate": Key("number", "of SGD at the start of a rung", 0.02, low=1e-8, high=10),
    "distill.temperature": Key("number", "softens the teacher's probabilities", 4.0, low=0.1, high=100),
    "distill.alpha": Key("number", "share of the teacher's loss, the rest is the labels'", 0.8, high=1),
    "distill.attention": Key("number", "weight of the attention maps' distance; 0: off", 0.0, high=1e6),
    "distill.hints": Key("number", "weight of the distance of features at the ends of stages; 0: off", 0.0, high=1e6),
    "distill.batch_size": Key("integer", "images per step", 128, low=2, high=10**5),
    "distill.train_limit": Key(
        "integer", "training images per epoch, every epoch others until all were shown; 0: all", 0, high=10**9
    ),
    "distill.device": Key(
        "text", "what trains: auto is a CUDA GPU where there is one, else the CPU", "auto", allowed=TRAINING_DEVICES
    ),
    "distill.precision": Key("text", "of convolutions and matrix products in training", "float32", allowed=PRECISIONS),
    "measure.latency": Key(
        "text", "measured: run on the device; predicted: by its latency model", "measured", allowed=LATENCIES
    ),
    "measure.runs": Key("integer", "timed runs in each process", 30, low=3, high=10**5),
    "measure.processes": Key("integer", "fresh processes per measurement", 3, low=1, high=100),
    "measure.warmup_s": Key("number", "of running before the timed runs", 0.05, high=600),
    "measure.time_limit_s": Key("number", "of one measurement", 60.0, low=1, high=86400),
    "measure.drift": Key(
        "number", "change of the original's latency that repeats a measurement", 0.03, low=0.001, high=1
    ),
}

PRESET_VALUES: Mapping[str, Mapping[str, Value]] = {
    "quick": {
        "search.trials": 32,
        "search.batch": 8,
        "search.proxy_images": 256,
        "distill.rungs": (2, 6),
        "distill.survivors": (22, 18),
    },
    "default": {
        "search.trials": 96,
        "search.batch": 16,
        "search.proxy_images": 512,
        "distill.rungs": (1, 3, 10),
        "distill.survivors": (24, 12, 8),
    },
    "thorough": {
        "search.trials": 320,
        "search.batch": 32,
        "search.proxy_images": 1024,
        "distill.rungs": (1, 3, 10, 30),
        "distill.survivors": (48, 24, 12, 8),
    },
}
