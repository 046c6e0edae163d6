"""Devices behind TVM RPC: a server on the device, or a tracker that lends one of several devices of a kind.

Whoever reaches an RPC server can run code on its machine: servers belong on loopback or on a network of one's own.
"""

from __future__ import annotations

import socket
from typing import Any

from ..hwmodels.device import Device, server_address
from .compiler import RunError

_ANSWER_S = 5.0


class DeviceLost(RunError):
    """A device that does not answer: no artifact is to blame, and the device may come back."""


def unanswered(device: Device) -> str | None:
    """Why a device behind RPC cannot be used now, None where something answers at its address.

    Nothing is said to a server here: one that is busy answers when it has time.
    """
    host, port, key = server_address(device.rpc, device.name)
    try:
        with socket.create_connection((host, port), _ANSWER_S):
            return None
    except OSError as error:
        return (
            f"nothing answers at {host}:{port} ({error.strerror or error}); start "
            f"`python -m planish.compilers.board_server --host {host} --port {port} --key {key}` there"
        )


def gone(device: Device) -> str | None:
    """Why a device that did not answer in time is lost: nothing is there any more. None where it is, or is this one.

    A device whose power or cable fails ends no connection: whoever waits for it does so for ever.
    """
    return unanswered(device) if device.rpc else None


def connect(rpc: str, time_limit_s: float) -> Any:
    """A session on the device: TVM's, of its own process on the device.

    Args:
        rpc: `host:port/key`, of a server or a tracker.
        time_limit_s: The device ends the session after so long, whatever runs in it.

    Raises:
        ConnectionError: nothing answers there, or not by that key.
    """
    import logging

    from tvm import rpc as tvm_rpc

    host, port, key = server_address(rpc, rpc)
    try:
        with socket.create_connection((host, port), _ANSWER_S):
            pass
    except OSError as error:
        raise ConnectionError(f"nothing answers at {host}:{port} ({error.strerror or error})") from error
    logging.getLogger("RPCTracker").setLevel(logging.ERROR)
    limit = max(1, round(time_limit_s))
    try:
        tracker = tvm_rpc.connect_tracker(host, port)
    except (RuntimeError, OSError, ValueError):
        tracker = None  # a server hangs up on who takes it for a tracker
    try:
        if tracker is not None:
            return tracker.request(key, session_timeout=limit)
        return tvm_rpc.connect(host, port, key=key, session_timeout=limit)
    except Exception as error:  # TVM raises whatever its C++ side does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConnectionError(f"{host}:{port} does not lend {key!r}: {reason}") from error
