"""Devices: this machine's CPU, the described ones, TOML files, and every way to name or describe one wrongly."""

from __future__ import annotations

import os
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.hwmodels import device as device_file
from planish.hwmodels.device import KINDS, Device, DeviceError, described, host, parse_device, server_address
from planish.hwmodels.fingerprint import fingerprint

GOOD = {
    "kind": '"cpu"',
    "target": '{ kind = "llvm", mcpu = "x86-64" }',
    "lanes": "8",
    "macs_per_s": "{ 32 = 1e10, 8 = 2e10 }",
    "bytes_per_s": "1e10",
    "memory_bytes": "1000",
}


def write(folder: Path, **changes: str | None) -> str:
    """A description with some keys changed, or left out where None is given."""
    lines = [f"{key} = {value}" for key, value in {**GOOD, **changes}.items() if value is not None]
    path = folder / "board.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_cpu_is_this_machine_with_one_thread() -> None:
    device = parse_device("cpu")
    assert device == host()
    assert (device.name, device.kind, device.threads, device.here) == ("cpu", "cpu", 1, True)
    assert device.lanes in (4, 8, 16)
    assert device.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_lanes_follow_the_vector_registers_of_the_features() -> None:
    device = host()
    assert device.lanes == (16 if "avx512f" in device.features else 8 if "avx2" in device.features else 4)


def test_threads_multiply_the_rates_and_nothing_else() -> None:
    most = os.cpu_count() or 1
    one, many = parse_device("cpu?threads=1"), parse_device(f"cpu?threads={most}")
    assert one == host()
    assert many.threads == most
    assert many.macs_per_s == {bits: pytest.approx(rate * most) for bits, rate in one.macs_per_s.items()}
    assert replace(many, name="cpu", threads=1, macs_per_s=one.macs_per_s) == one


def test_devices_of_one_name_are_equal(tmp_path: Path) -> None:
    text = write(tmp_path, threads="4")
    assert parse_device(f"{text}?threads=4") == parse_device(text)
    names = [parse_device(f"{text}?threads={n}").name for n in (1, 2, 4)]
    assert len(set(names)) == 3
    assert parse_device("cpu/cascadelake?threads=2").name == "cpu/cascadelake?threads=2"


@pytest.mark.parametrize(
    "text",
    [
        *(f"cpu?threads={value}" for value in ("0", "-1", "", "two", "1.0", "100000", "²", "1&lanes=2")),
        *("cpu?threads", "cpu?cores=2", "cuda/sm_90?threads=2"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(DeviceError, match=r"allowed (is|are)") as caught:
        parse_device(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cpuu", "cpu"), ("cuda/sm90", "cuda/sm_90"), ("fpga/ecp5", "fpga/ecp5-85k"), ("cpu/cascade", "cpu/cascadelake")],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all(name: str, nearest: str) -> None:
    with pytest.raises(DeviceError, match="is not known") as caught:
        parse_device(name)
    assert f"Did you mean {nearest!r}?" in str(caught.value)
    assert all(known in str(caught.value) for known in ("cpu", *described()))


def test_nothing_is_suggested_for_a_name_that_resembles_none() -> None:
    with pytest.raises(DeviceError) as caught:
        parse_device("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_a_device_behind_rpc_is_like_the_one_that_its_key_names() -> None:
    board, like = parse_device("rpc://board:9090/cpu/cortex-a72?threads=4"), parse_device("cpu/cortex-a72?threads=4")
    assert (board.rpc, board.here, board.name) == (
        "board:9090/cpu/cortex-a72",
        False,
        "rpc://board:9090/cpu/cortex-a72?threads=4",
    )
    assert (board.target, board.lanes, board.threads, board.macs_per_s) == (
        like.target, like.lanes, like.threads, like.macs_per_s
    )  # fmt: skip
    same = parse_device("rpc://[::1]:9090/cpu")
    assert (same.here, same.features, server_address(same.rpc, same.name)) == (
        False,
        host().features,
        ("::1", 9090, "cpu"),
    )
    assert fingerprint(same) != fingerprint(host())


@pytest.mark.parametrize(
    "address", ["board:9090", "board/cpu", ":9090/cpu", "board:0/cpu", "board:99999/cpu", "b:x/cpu"]
)
def test_an_address_that_is_none_is_told_with_its_form(address: str) -> None:
    with pytest.raises(DeviceError, match="it must be host:port/key"):
        parse_device(f"rpc://{address}")


def test_a_file_says_where_its_device_is_reached(tmp_path: Path) -> None:
    device = parse_device(write(tmp_path, rpc='"lab:9090/rack 3"'))
    assert (device.rpc, device.here) == ("lab:9090/rack 3", False)
    with pytest.raises(DeviceError, match="it must be host:port/key"):
        parse_device(write(tmp_path, rpc='"lab"'))


@given(st.text(max_size=30))
def test_any_text_is_a_device_or_a_device_error(text: str) -> None:
    try:
        device = parse_device(text)
    except DeviceError:
        pass
    else:
        assert device.rpc or device.name.partition("?")[0] in ("cpu", *described())


@pytest.mark.parametrize("name", described())
def test_every_described_device_is_valid_and_not_here(name: str) -> None:
    device = parse_device(name)
    assert device == described()[name]
    assert not device.here
    assert device.kind == name.partition("/")[0]
    assert device.kind in KINDS
    assert device.source, "a peak rate without a source cannot be checked"
    assert device.target["kind"]
    # Narrower operands are never slower.
    rates = [device.macs_per_s[bits] for bits in sorted(device.macs_per_s)]
    assert rates == sorted(rates, reverse=True)


def test_a_file_describes_a_device_named_after_it(tmp_path: Path) -> None:
    device = parse_device(write(tmp_path, features='["avx2"]', title='"a board"', source='"its data sheet"'))
    assert device == Device(
        name="board",
        kind="cpu",
        title="a board",
        target={"kind": "llvm", "mcpu": "x86-64"},
        lanes=8,
        features=("avx2",),
        threads=1,
        macs_per_s={32: 1e10, 8: 2e10},
        bytes_per_s=1e10,
        memory_bytes=1000,
        here=False,
        source="its data sheet",
    )


@pytest.mark.parametrize(
    ("key", "nearest"), [("lane", "lanes"), ("memory", "memory_bytes"), ("macs_per_sec", "macs_per_s")]
)
def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    with pytest.raises(DeviceError, match=f"unknown key {key!r}; did you mean {nearest!r}"):
        parse_device(write(tmp_path, **{key: "1"}))


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(DeviceError, match=f"'board' lacks {key}"):
        parse_device(write(tmp_path, **{key: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "3"),
        ("kind", '"tpu"'),
        ("target", '"llvm"'),
        ("lanes", '"8"'),
        ("lanes", "8.5"),
        ("lanes", "true"),
        ("lanes", "0"),
        ("threads", "1.5"),
        ("threads", "-1"),
        ("features", '"avx2"'),
        ("macs_per_s", "1e10"),
        ("macs_per_s", "{}"),
        ("macs_per_s", "{ fast = 1e10 }"),
        ("macs_per_s", "{ 32 = [] }"),
        ("macs_per_s", "{ 32 = 0 }"),
        ("macs_per_s", "{ 32 = nan }"),
        ("macs_per_s", "{ 0 = 1e10 }"),
        ("bytes_per_s", "[]"),
        ("bytes_per_s", "-1"),
        ("bytes_per_s", "nan"),
        ("memory_bytes", '"much"'),
        ("memory_bytes", "0"),
        ("memory_bytes", "inf"),
        ("memory_bytes", "nan"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_with_its_device(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(DeviceError, match="'board'"):
        parse_device(write(tmp_path, **{key: value}))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="does not exist"):
        parse_device(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    for content in (b"lanes = ", b"\xff\xfe", b"[[[["):
        broken.write_bytes(content)
        with pytest.raises(DeviceError, match="cannot be read") as caught:
            parse_device(str(broken))
        assert str(broken) in str(caught.value)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(DeviceError, match="cannot be read"):
        parse_device(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize("value", [0, -1, nan, inf])
@pytest.mark.parametrize("label", ["lanes", "threads", "bytes_per_s", "memory_bytes"])
def test_a_size_that_is_not_positive_and_finite_is_refused(label: str, value: float) -> None:
    with pytest.raises(DeviceError, match=f"has {label}"):
        replace(host(), **{label: value})  # type: ignore[arg-type]


def test_the_clock_of_the_moment_is_no_part_of_a_board_s_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = set()
    for hertz in (2.0e9, 2.4e9):
        monkeypatch.setattr("planish.hwmodels.device._cpu_hertz", lambda hertz=hertz: hertz)
        prints.add(fingerprint(parse_device("rpc://board:9090/cpu")))
    assert len(prints) == 1
    assert fingerprint(parse_device("rpc://other:9090/cpu")) not in prints
    assert fingerprint(parse_device("cpu/cortex-a72")) != fingerprint(parse_device("cpu/cortex-a76"))


@pytest.mark.parametrize(
    ("flags", "lanes", "features"),
    [
        ({"avx2", "avx512f", "avx512bw", "avx512cd"}, 16, ("avx2", "avx512f")),
        ({"avx2", "avx512f", "avx512cd"}, 8, ("avx2",)),
        ({"sse2"}, 4, ()),
    ],
)
def test_wide_vectors_are_those_that_hold_bytes_too(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], lanes: int, features: tuple[str, ...]
) -> None:
    monkeypatch.setattr(device_file, "cpu_flags", lambda: frozenset(flags))
    assert (host().lanes, host().features) == (lanes, features)
