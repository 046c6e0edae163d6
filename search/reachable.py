"""Whether the devices behind RPC answer: asked before anything is spent on them."""

from __future__ import annotations

from collections.abc import Iterable

from ..compilers.remote import unanswered
from ..hwmodels.device import Device
from .errors import UserError


def check_answers(devices: Iterable[Device]) -> None:
    """Asks each that is behind RPC.

    Raises:
        UserError: one does not answer; the line says what to start there.
    """
    for device in devices:
        reason = unanswered(device) if device.rpc else None
        if reason:
            raise UserError(f"device {device.name!r}: {reason}")
