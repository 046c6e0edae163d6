"""Timing on a node of a Ray cluster: one worker for the node that offers the device as a resource, one job at a time.

A node says that it is the device with `ray start --address=HEAD:6379 --resources='{"device:cpu": 1}'`; without such a
node candidates are timed where `planish search` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compilers import runner
from ..compilers.compiler import RunError
from ..compilers.pinned import pinned
from ..compilers.remote import DeviceLost
from ..hwmodels.device import Device, parse_device
from ..hwmodels.fingerprint import fingerprint

if TYPE_CHECKING:
    from ..compilers.compiler import Compiler
    from ..hwmodels.measurement import Measurement, MeasureProtocol

# Enough to be placed on the node: `cpu` and `cpu?threads=2` are the same one, and another search may time there too.
# That one measurement runs at a time is the device's lock's to see to.
_SHARE = 0.001
Calls = dict[str, list[tuple[str, str, float]]]


class LocalTimer:
    """Times on a device that this process reaches."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        """For a device and what compiles for it."""
        self._device, self._compiler = device, compiler

    def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
        """See `Compiler.measure`."""
        return self._compiler.measure(artifacts, self._device, protocol)

    def site_times(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Calls:
        """See `runner.site_times`."""
        return runner.site_times(artifacts, self._device, protocol)


class DeviceWorker:
    """Times on the node of the cluster that is the device; the folders must be on a disk that it shares."""

    def __init__(self, name: str) -> None:
        """Starts the worker on the node that offers `device:NAME`.

        Args:
            name: Of the device, with its options (`cpu?threads=2`).
        """
        import ray

        self._ray, self._name = ray, name
        # Of the first node that answered: one that the worker is started again on must be of the same kind.
        self._identity = ""
        actor = ray.remote(num_cpus=0, resources={resource(name): _SHARE}, max_restarts=-1, max_task_retries=0)(_Timing)
        self._actor = actor.remote(name)

    def device(self) -> Device:
        """The device as the node itself sees it, pinned.

        Raises:
            DeviceLost: the worker does not answer.
        """
        found: Device = self._call("device")
        self._identity = found.identity
        return found

    def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
        """See `Compiler.measure`; DeviceLost where the worker died or its node is gone."""
        found: Mapping[str, Measurement] = self._call("measure", dict(artifacts), protocol)
        return found

    def site_times(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Calls:
        """See `runner.site_times`; DeviceLost where the worker died or its node is gone."""
        found: Calls = self._call("site_times", dict(artifacts), protocol)
        return found

    def close(self) -> None:
        """Ends the worker."""
        self._ray.kill(self._actor)

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            result = self._ray.get(self._actor.call.remote(method, arguments, self._identity))
        except self._ray.exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            raise DeviceLost(
                f"the device worker of {self._name} is lost: {lines[0] if lines else type(error).__name__}"
            ) from error
        if isinstance(result, RunError):
            raise result
        return result


class _Timing:
    """The actor."""

    def __init__(self, name: str) -> None:
        self._name = name

    def call(self, method: str, arguments: tuple[Any, ...], identity: str) -> Any:
        device = parse_device(self._name)
        if identity and fingerprint(device) != identity:
            return DeviceLost(
                f"the node that offers {resource(self._name)} now has another processor than the one that the search "
                "has timed on; only one kind may offer it"
            )
        try:
            if method == "device":
                return pinned(device)
            return getattr(runner, method)(*arguments[:1], device, *arguments[1:])
        except RunError as error:
            return error


def resource(name: str) -> str:
    """The Ray resource of the node that is a device, whatever its options."""
    return f"device:{name.partition('?')[0]}"


def offered(name: str) -> bool:
    """Whether a node of the cluster that this process is connected to says that it is the device."""
    import ray

    return float(ray.cluster_resources().get(resource(name), 0)) >= 1
