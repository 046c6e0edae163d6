"""Whether devices can be timed from here: asked before anything is spent on them."""

from __future__ import annotations

from collections.abc import Iterable

from ..compilers.remote import unanswered
from ..hwmodels.device import Device
from .errors import UserError


def check_answers(devices: Iterable[Device], *, predicted: bool) -> None:
    """Asks each that is behind RPC; one that is only described will do where latency is predicted.

    Raises:
        UserError: one does not answer, and the line says what to start there; or nothing can be timed on it.
    """
    for device in devices:
        if not device.timed and not predicted:
            raise UserError(
                f"device {device.name!r} is only described ({device.title}), so that nothing can be timed on it: "
                "predict its latency with --set measure.latency=predicted, or name the RPC server that runs on it with "
                f"rpc://host:port/{device.name}"
            )
        reason = unanswered(device) if device.rpc else None
        if reason:
            raise UserError(f"device {device.name!r}: {reason}")
