"""What a device is: the numbers a latency model needs and the target a compiler needs."""

from __future__ import annotations

import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any

KINDS = ("cpu", "cuda", "fpga")
_NUMBER = (int, float)
_NEEDED: Mapping[str, tuple[type, ...]] = {
    "kind": (str,),
    "target": (dict,),
    "lanes": (int,),
    "macs_per_s": (dict,),
    "bytes_per_s": _NUMBER,
    "memory_bytes": _NUMBER,
}
_KEYS = {**_NEEDED, "title": (str,), "features": (list,), "threads": (int,), "source": (str,), "rpc": (str,)}
_RPC = "rpc://"


class DeviceError(ValueError):
    """A device that is not known, not described well, or not usable here."""


@dataclass(frozen=True)
class Device:
    """A device that a model is to be fast on.

    `macs_per_s` (by bits of the operands, all `threads` together) and `bytes_per_s` are peaks: bounds for a roofline,
    not predictions. `here` says that it is the machine this process runs on, so that it can be measured; `rpc`
    (`host:port/key`) where a TVM RPC server or tracker leads to it. `instructions`, `identity` (its fingerprint) and
    `siblings` (the fingerprints of its other numbers of threads) are known of one that was pinned, so that other
    machines can compile for it and predict its latency; so are `tiles`, how its convolutions are computed fastest by
    measurement.
    """

    name: str
    kind: str
    title: str
    target: Mapping[str, str]
    lanes: int
    features: tuple[str, ...]
    threads: int
    macs_per_s: Mapping[int, float]
    bytes_per_s: float
    memory_bytes: int
    here: bool
    source: str = ""
    rpc: str = ""
    instructions: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    siblings: Mapping[int, str] = field(default_factory=dict)
    tiles: Mapping[str, str] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether something can be timed on it from here; on one that is only described, nothing can."""
        return self.here or bool(self.rpc)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DeviceError(f"device {self.name!r} has the kind {self.kind!r}; allowed are {', '.join(KINDS)}")
        for label in ("lanes", "threads", "bytes_per_s", "memory_bytes"):
            value = getattr(self, label)
            if not 0 < value < inf:
                raise DeviceError(f"device {self.name!r} has {label} {value}; it must be positive")
        if not self.macs_per_s or not all(b > 0 and 0 < rate < inf for b, rate in self.macs_per_s.items()):
            raise DeviceError(f"device {self.name!r} needs macs_per_s: positive rates by bits, such as {{ 32 = 1e11 }}")


def parse_device(text: str) -> Device:
    """The device of a name, `cpu?threads=2`, the path of a TOML file that describes one, or `rpc://host:port/key`.

    The key of a device behind TVM RPC is the name of the device that it is like: a described one, or `cpu` for a
    processor like this machine's. A TOML file says where its own device is with `rpc = "host:port/key"`.

    Raises:
        DeviceError: the name is not known, or an option or a file is wrong.
    """
    name, _, query = text.partition("?")
    if name.startswith(_RPC):
        device = _behind_rpc(name, name.removeprefix(_RPC))
    elif name == "cpu":
        device = host()
    elif name.endswith(".toml"):
        device = _from_file(Path(name))
    else:
        device = _described(name)
    return _with_options(device, text, query)


def described() -> dict[str, Device]:
    """The devices of `devices.toml`, by name."""
    text = resources.files(__package__).joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: _from_table(name, table, "devices.toml") for name, table in tomllib.loads(text).items()}


def host() -> Device:
    """This machine's CPU with one thread."""
    flags, hertz = cpu_flags(), _cpu_hertz()
    if not {"avx512f", "avx512bw"} <= flags:  # without the latter there are no vectors of 64 bytes, only of floats
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "asimddp")
    features = tuple(f for f in known if f in flags)
    # One fused multiply-add of a whole vector in a cycle: what one core keeps up with certainty; more is a bonus.
    rate = hertz * lanes
    bytes_gain = 4 if "avx512_vnni" in flags or "asimddp" in flags else 2 if "avx2" in flags else 1
    return Device(
        name="cpu",
        kind="cpu",
        title=f"this machine's CPU ({platform.machine()}, {os.cpu_count()} cores)",
        target={"kind": "llvm", "mcpu": "host"},
        lanes=lanes,
        features=features,
        threads=1,
        macs_per_s={32: rate, **({16: rate * 2} if "avx512_bf16" in flags else {}), 8: rate * bytes_gain},
        bytes_per_s=1e10,
        memory_bytes=_memory_bytes(),
        here=True,
        source="features from the operating system; rates from the clock and the vector width, not measured",
    )


def _behind_rpc(name: str, place: str) -> Device:
    server_address(place, name)
    like = place.partition("/")[2]
    device = host() if like == "cpu" else _described(like)
    return replace(device, name=name, title=f"{device.title}, at {place}", here=False, rpc=place)


def server_address(rpc: str, name: str) -> tuple[str, int, str]:
    """Host, port and key of `host:port/key`.

    Args:
        rpc: As in `Device.rpc`.
        name: The device's, for the error.

    Raises:
        DeviceError: it is not of that form.
    """
    address, _, key = rpc.partition("/")
    server, _, port = address.rpartition(":")
    if not server or not key or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeviceError(f"device {name!r} has the RPC address {rpc!r}; it must be host:port/key, as board:9090/cpu")
    return server.removeprefix("[").removesuffix("]"), int(port), key


def _with_options(device: Device, text: str, query: str) -> Device:
    if not query:
        return device
    key, _, value = query.partition("=")
    if key != "threads" or device.kind != "cpu":
        raise DeviceError(f"device {text!r} has the option {key!r}; allowed is threads=N, of a CPU")
    most = (os.cpu_count() or 1) if device.here else 1024
    if not value.isdecimal() or not 1 <= int(value) <= most:
        raise DeviceError(f"device {text!r} asks for {value or 'no'} threads; allowed are 1 to {most}")
    threads = int(value)
    if threads == device.threads:
        return device
    scale = threads / device.threads
    rates = {bits: rate * scale for bits, rate in device.macs_per_s.items()}
    return replace(device, name=f"{device.name}?threads={threads}", threads=threads, macs_per_s=rates)


def _described(name: str) -> Device:
    from difflib import get_close_matches

    known = described()
    if name in known:
        return known[name]
    near = get_close_matches(name, ["cpu", *known], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DeviceError(
        f"device {name!r} is not known.{hint} Known are cpu, {', '.join(sorted(known))}, "
        "or the path of a TOML file that describes one"
    )


def _from_file(path: Path) -> Device:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeviceError(f"device file {str(path)!r} does not exist; name a file or see `planish devices`") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeviceError(f"device file {str(path)!r} cannot be read: {error}") from None
    return _from_table(path.stem, table, str(path))


def _from_table(name: str, table: Mapping[str, Any], where: str) -> Device:
    from difflib import get_close_matches

    for key, value in table.items():
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KEYS)}"
            raise DeviceError(f"{where}: device {name!r} has the unknown key {key!r}; {hint}")
        if type(value) not in _KEYS[key]:
            allowed = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise DeviceError(f"{where}: device {name!r} has {key} = {value!r}; its type must be {allowed}")
    missing = [key for key in _NEEDED if key not in table]
    if missing:
        raise DeviceError(f"{where}: device {name!r} lacks {', '.join(missing)}")
    try:
        return Device(
            name=name,
            kind=table["kind"],
            title=table.get("title", name),
            target={str(k): str(v) for k, v in table["target"].items()},
            lanes=table["lanes"],
            features=tuple(str(f) for f in table.get("features", ())),
            threads=table.get("threads", 1),
            macs_per_s={int(bits): float(rate) for bits, rate in table["macs_per_s"].items()},
            bytes_per_s=float(table["bytes_per_s"]),
            memory_bytes=int(table["memory_bytes"]),
            here=False,
            source=table.get("source", ""),
            rpc=_checked_rpc(table.get("rpc", ""), name),
        )
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(f"{where}: device {name!r} has a value of the wrong type: {error}") from None


def _checked_rpc(rpc: str, name: str) -> str:
    if rpc:
        server_address(rpc, name)
    return rpc


def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as `/proc/cpuinfo` names it; empty where the operating system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset({"asimd"}) if platform.machine() in ("arm64", "aarch64") else frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cpu_hertz() -> float:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return max(float(line.split(":")[1]) for line in text.splitlines() if line.startswith("cpu MHz")) * 1e6
    except (OSError, ValueError):
        return 2e9  # unknown clocks are mostly near this


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 << 30
