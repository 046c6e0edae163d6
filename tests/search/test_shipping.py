"""What a node that has nothing of the user's gets: planish's code, and the task with the classes of the user's file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from planish.search.errors import UserError
from planish.search.shipping import fetched, own_code, stored
from planish.search.tasks import load_task
from planish.search.workers import answers

pytestmark = pytest.mark.ray

_FILE = """
import torch
from torch import nn


class Halving(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)) / 2


def model():
    torch.manual_seed(0)
    return Halving().eval()


def inside(outputs, targets):
    return outputs.topk(2).indices.eq(targets[:, None]).any(1)


def data():
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    return (x, y), (x, y), (x, y), inside
"""


def _on_node(task: object) -> tuple[str, list[str], torch.Tensor, str]:
    import importlib
    import sys

    import numpy

    for part in ("spaces.apply", "hwmodels.device", "compilers.cpu.machine", "search.evaluate"):
        importlib.import_module(f"planish.{part}")
    files = [str(sys.modules[f"planish.{part}"].__file__) for part in ("search.evaluate", "compilers.cpu.machine")]
    inputs = torch.as_tensor(numpy.ones((2, 1, 8, 8), numpy.float32))
    return os.environ.get("PYTHONPATH", ""), files, task.model(inputs), task.metric  # type: ignore[attr-defined]


def test_a_worker_has_the_launching_planish_and_the_users_classes(tmp_path: Path) -> None:
    import ray

    (tmp_path / "mine.py").write_text(_FILE, encoding="utf-8")
    task = load_task(f"{tmp_path / 'mine.py'}:model", f"{tmp_path / 'mine.py'}:data")
    expected = task.model(torch.ones(2, 1, 8, 8))
    (tmp_path / "mine.py").unlink()
    with own_code() as code:
        ray.init(
            address="local", num_cpus=1, log_to_driver=False, include_dashboard=False,
            runtime_env={**code, "env_vars": {"PYTHONPATH": "nowhere"}},
        )  # fmt: skip
        try:
            assert answers()
            # By value, because a node has no tests either.
            ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_on_node"]))
            path, files, found, metric = ray.get(ray.remote(_on_node).remote(stored(task)))
        finally:
            ray.shutdown()
    assert path.endswith("nowhere") or "nowhere" in path
    assert all("runtime_resources" in file for file in files), files
    assert torch.equal(found, expected)
    assert metric == "inside"


@pytest.mark.parametrize("name", ["ObjectStoreFullError", "OutOfDiskError"])
def test_a_store_without_room_is_told_in_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def full(task: object) -> None:
        raise getattr(ray.exceptions, name)("no room")

    monkeypatch.setattr(ray, "put", full)
    monkeypatch.setattr(ray, "get", full)
    with pytest.raises(UserError, match=r"does not fit into Ray's object store: .*--object-store-memory"):
        stored(object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot read the task .* same command again"):
        fetched(object())


def test_what_cannot_be_sent_is_told_in_a_line() -> None:
    import threading

    import ray

    ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
    try:
        with pytest.raises(UserError, match=r"cannot be sent to the workers: cannot pickle .*lock"):
            stored(threading.Lock())  # type: ignore[arg-type]
    finally:
        ray.shutdown()
