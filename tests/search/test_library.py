"""A space's table of options: what it says of candidates against what they are, its file, and what it leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.hwmodels.cycles import CountedCycles
from planish.hwmodels.device import parse_device
from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.dynamic_program import solve
from planish.search.errors import UserError
from planish.search.evaluate import Evaluator, Job
from planish.search.latency_table import plan_of
from planish.search.library import latency_model, option_table
from planish.search.library_file import library_key, read_library, write_library
from planish.search.option_gains import gains_in_short, option_gains
from planish.search.option_table import OptionTable, levels_of
from planish.search.tasks import Task
from planish.search.zoo import SmallResNet
from planish.spaces.apply import skeleton
from planish.spaces.local_error import LocalErrors
from planish.spaces.size import count_macs, stored_bytes
from planish.spaces.space import Candidate, Choice

pytestmark = pytest.mark.tvm


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    torch.manual_seed(0)
    split = Split(torch.randn(8, 1, 16, 16), torch.arange(8) % 4)
    data = Data(split, split, split, ("a", "b", "c", "d"))
    task = Task(SmallResNet(widths=(16, 32), blocks=1, classes=4).eval(), data)
    found = Evaluator(load_spec(None, {"model": "own", "data": "own", "space.lanes": 8}), task)
    # What the machine's database knows of kernels is not what this is about.
    found.times = tmp_path_factory.mktemp("times") / "none.sqlite"
    return found


@pytest.fixture(scope="module")
def table(evaluator: Evaluator) -> OptionTable:
    rising = {c.name: tuple(0.01 * level for level in range(len(c.options))) for c in evaluator.proposal.space.choices}
    return option_table(evaluator, LocalErrors(rising, {}), ["latency[cpu]", "size", "macs"])


def in_table(table: OptionTable, rng: np.random.Generator) -> Candidate:
    """A candidate of combinations that the table holds."""
    levels = np.zeros(len(table.space.choices), dtype=np.int64)
    for place in table.shared_errors:
        levels[place] = rng.integers(len(table.space.choices[place].options))
    for site in table.sites:
        levels[list(site.own)] = site.combinations[rng.integers(len(site.combinations))]
    return table.space.decode(levels)


def test_sizes_and_macs_are_those_of_the_candidates(evaluator: Evaluator, table: OptionTable) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        candidate = in_table(table, rng)
        module = skeleton(candidate, evaluator.traced, evaluator.proposal)
        levels = levels_of(table.space, [candidate])
        assert table.cost("macs", levels)[0] == count_macs(module, evaluator.traced.example)
        assert table.cost("size", levels)[0] == stored_bytes(module), candidate.options


def test_latencies_are_near_those_of_the_candidates_plans(evaluator: Evaluator, table: OptionTable) -> None:
    rng = np.random.default_rng(1)
    model = CountedCycles(evaluator.devices["cpu"])
    for _ in range(8):
        candidate = in_table(table, rng)
        wanted = model.predict(plan_of(evaluator, "cpu", candidate).calls).latency_s
        got = table.cost("latency[cpu]", levels_of(table.space, [candidate]))[0]
        # Moves between float32 and bytes, and channels of elementwise operators, are not in the table.
        assert got == pytest.approx(wanted, rel=0.25)


def test_a_device_that_is_only_described_is_predicted_at_its_peak_with_a_wide_error(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    device = parse_device("cpu/x86-64-v3")
    spec = load_spec(None, {"model": "own", "data": "own", "device": device.name, "measure.latency": "predicted"})
    elsewhere = Evaluator(spec, evaluator.task)
    original = elsewhere.proposal.space.original()
    found = elsewhere.foresee(Job(0, original, 0, tmp_path))
    latency: Any = found["latency_s"]
    entry = latency[device.name]
    peak_s = count_macs(evaluator.task.model, evaluator.traced.example) / device.macs_per_s[32]
    # No kernel is faster than the peak (Winograd's needs 4 multiplications for 9 or 16 for 36), and none ten times
    # slower at these sizes.
    assert peak_s / 4 < entry["value"] < 10 * peak_s + 1e-4
    assert entry["ci95"][1] > 1.9 * entry["value"]


def test_an_error_is_the_sum_of_the_options(table: OptionTable) -> None:
    candidate = in_table(table, np.random.default_rng(2))
    levels = levels_of(table.space, [candidate])
    assert table.error(levels)[0] == pytest.approx(0.01 * levels.sum())


def test_a_combination_that_was_left_out_counts_as_its_nearest(table: OptionTable) -> None:
    rng = np.random.default_rng(3)
    levels = levels_of(table.space, [table.space.sample(rng) for _ in range(50)])
    for name in table.fixed:
        costs = table.cost(name, levels)
        assert np.isfinite(costs).all()
        assert (costs > 0).all()


def test_options_that_are_never_worth_it_are_named_with_what_beats_them(evaluator: Evaluator) -> None:
    # Codebooks change no latency: where latency alone counts they only spoil.
    space = evaluator.proposal.space
    errors = {c.name: tuple(0.01 * level for level in range(len(c.options))) for c in space.choices}
    errors["stem:bits"] = (*errors["stem:bits"][:-1], float("inf"))  # 4 bits; how many are before it is the device's
    found = option_table(evaluator, LocalErrors(errors, {"stem:bits=4": "broken"}), ["latency[cpu]"])
    clusters = {f"{c.name}={o}" for c in space.choices if c.kind.value == "cluster" for o in c.options[1:]}
    assert clusters
    assert clusters <= set(found.left_out)
    assert found.left_out["stem:bits=4"] == "broken"
    for site in found.sites:
        for column, place in enumerate(site.own):
            if space.choices[place].kind.value == "cluster":
                assert not site.combinations[:, column].any()


@pytest.mark.parametrize("costs", [["energy"], ["memory"], ["latency[cpu]", "memory"]])
def test_where_a_cost_does_not_add_up_over_sites_what_is_near_it_keeps_options(
    evaluator: Evaluator, costs: list[str]
) -> None:
    rising = {c.name: tuple(0.01 * level for level in range(len(c.options))) for c in evaluator.proposal.space.choices}
    found = option_table(evaluator, LocalErrors(rising, {}), costs)
    assert set(found.fixed) == {"latency[cpu]", "macs"}
    assert sum(len(site.combinations) for site in found.sites) > 3 * len(found.sites)


def test_a_table_survives_its_file(table: OptionTable, tmp_path: Path) -> None:
    path = tmp_path / "library.json"
    write_library(path, table, "key", "")
    again = read_library(path, table.space, "key")
    assert again is not None
    rng = np.random.default_rng(4)
    levels = levels_of(table.space, [table.space.sample(rng) for _ in range(20)])
    assert (again.error(levels) == table.error(levels)).all()
    for name in table.fixed:
        assert (again.cost(name, levels) == table.cost(name, levels)).all()
    assert again.left_out == table.left_out
    assert read_library(path, table.space, "another key") is None
    assert read_library(tmp_path / "missing.json", table.space, "key") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "{",
        lambda d: json.dumps({**d, "sites": [{**d["sites"][0], "combinations": [[99] * len(d["sites"][0]["own"])]}]}),
        lambda d: json.dumps({**d, "fixed": {"latency[cpu]": "much"}}),
        lambda d: json.dumps({**d, "option_errors": {}}),
        lambda d: json.dumps({**d, "sites": 7}),
    ],
    ids=["cut", "level", "text", "missing", "kind"],
)
def test_a_damaged_file_is_refused_in_one_line(table: OptionTable, tmp_path: Path, damage: object) -> None:
    path = tmp_path / "library.json"
    write_library(path, table, "key", "")
    assert callable(damage)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match=r"library\.json") as error:
        read_library(path, table.space, "key")
    assert "\n" not in str(error.value)


def test_the_key_follows_weights_and_costs(table: OptionTable) -> None:
    one, two = torch.zeros(3), torch.ones(3)
    cpu, other = parse_device("cpu"), parse_device("cpu/cortex-a72")
    keys = {
        library_key(table.space, ["size"], [cpu], [one]),
        library_key(table.space, ["size"], [cpu], [two]),
        library_key(table.space, ["macs"], [cpu], [one]),
        library_key(table.space, ["size"], [other], [one]),
        library_key(table.space, ["size"], [replace(cpu, tiles={"conv": "direct"})], [one]),
        library_key(table.space, ["size"], [replace(other, macs_per_s={32: 1e9})], [one]),
    }
    assert len(keys) == 6
    # The clock of this moment is another one than when the run was stopped.
    clocked = replace(cpu, macs_per_s={bits: 1.07 * rate for bits, rate in cpu.macs_per_s.items()})
    assert library_key(table.space, ["size"], [clocked], [one]) in keys


def test_choices_are_named_in_the_order_of_the_space(table: OptionTable) -> None:
    assert all(isinstance(choice, Choice) for choice in table.space.choices)
    for site in table.sites:
        assert all(table.space.choices[place].site == site.name for place in site.own)


def test_what_gains_nothing_says_why(evaluator: Evaluator) -> None:
    rows = option_gains(evaluator, "cpu")
    space = evaluator.proposal.space
    assert [(r["choice"], r["option"]) for r in rows] == [(c.name, o) for c in space.choices for o in c.options[1:]]
    assert any(row["pays"] for row in rows)
    for row in rows:
        ratio = row["latency_ratio"]
        assert isinstance(ratio, float)
        assert row["pays"] == (ratio < 0.998)
        assert bool(row["why"]) != row["pays"]
        if str(row["choice"]).endswith(":cluster"):
            assert ratio == pytest.approx(1)
            assert "storage" in str(row["why"])
            size = row["size_ratio"]
            assert isinstance(size, float)
            assert size < 1


def test_a_terminal_is_shown_the_best_gains_and_a_count_for_every_reason(evaluator: Evaluator) -> None:
    rows = option_gains(evaluator, "cpu")
    short = gains_in_short({"model": "own", "devices": {"cpu": {"gains": rows, "title": "t"}, "none": {}}})
    devices = short["devices"]
    assert isinstance(devices, dict)
    shown = [row["latency_ratio"] for row in devices["cpu"]["gains"]]
    assert shown == sorted(float(str(row["latency_ratio"])) for row in rows)[: len(shown)]
    assert sum(devices["cpu"]["gain_nothing"].values()) == sum(not row["pays"] for row in rows)
    assert devices["none"] == {}


def test_a_board_that_was_never_profiled_is_predicted_as_it_is_described(evaluator: Evaluator) -> None:
    """An address makes nothing known of it."""
    for name, like in (("rpc://127.0.0.1:9/cpu/x86-64-v3", "cpu/x86-64-v3"), ("rpc://127.0.0.1:9/cpu", "cpu")):
        spec = {"model": "own", "data": "own", "measure.latency": "predicted"}
        board, described = (Evaluator(load_spec(None, spec | {"device": d}), evaluator.task) for d in (name, like))
        board.times = described.times = evaluator.times
        found, wanted = latency_model(board, name), latency_model(described, like)
        assert isinstance(found, CountedCycles)
        assert isinstance(wanted, CountedCycles)
        assert (found.clock_hz, found.error) == (wanted.clock_hz, wanted.error)


class Concatenated(nn.Module):
    """As DenseNet: every layer reads what all before it have made."""

    def __init__(self, layers: int, growth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(32 + growth * n, growth, 3, padding=1) for n in range(layers))
        self.head = nn.Linear(32 + growth * layers, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_layers_behind_many_concatenations_have_a_table_that_can_be_held() -> None:
    """Fourteen groups of channels enter the last layers: all their states together would be millions."""
    torch.manual_seed(0)
    split = Split(torch.randn(8, 3, 6, 6), torch.arange(8) % 4)
    task = Task(Concatenated(14).eval(), Data(split, split, split, ("a", "b", "c", "d")))
    keys = {"model": "own", "data": "own", "space.lanes": 4, "space.families": ["prune"]}
    evaluator = Evaluator(load_spec(None, keys), task)
    space = evaluator.proposal.space
    errors = LocalErrors({c.name: tuple(0.01 * n for n in range(len(c.options))) for c in space.choices}, {})
    found = option_table(evaluator, errors, ["macs", "size"])
    assert prod(len(c.options) for c in space.choices) > 10**7
    assert max(costs.size for site in found.sites for costs in site.costs.values()) <= 1024
    rng = np.random.default_rng(0)
    for candidate in [space.original(), *(space.sample(rng) for _ in range(10))]:
        built = evaluator.skeleton(candidate)
        macs = count_macs(built, evaluator.traced.example)
        told = float(found.cost("macs", levels_of(space, [candidate]))[0])
        # What the narrow inputs save is counted at least, of layers as narrow as they can be.
        assert macs * (1 - 1e-9) <= told <= 1.5 * macs
        assert found.cost("size", levels_of(space, [candidate]))[0] >= stored_bytes(built) * (1 - 1e-9)
    solved = solve(found, "macs")
    least = solved.best(solved.least() * (1 + 1e-9))
    assert least is not None
    assert count_macs(evaluator.skeleton(least), evaluator.traced.example) < 0.2 * macs_of(evaluator)


def macs_of(evaluator: Evaluator) -> float:
    return count_macs(evaluator.traced.module, evaluator.traced.example)
