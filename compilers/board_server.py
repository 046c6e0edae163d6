"""Serves this machine as a device over TVM RPC: `python -m planish.compilers.board_server --key cpu/cortex-a72`.

A board needs this file, Python, numpy and TVM's runtime, and nothing of Planish besides. TVM's own server stops
serving for good once compiled code has crashed in a session and keeps the client waiting; this one goes on.

Whoever can reach the port can run code here. It is loopback's alone unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

# A server that ends sooner than this has not served: its port is taken, or its tracker is no tracker.
_SERVED_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(prog="board_server", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=9090)
    parser.add_argument("--key", required=True, help="what the device is like: a name of `planish devices`")
    parser.add_argument("--tracker", default="", metavar="HOST:PORT", help="a TVM RPC tracker that lends the device")
    args = parser.parse_args(arguments)
    tracker = None
    if args.tracker:
        host, _, port = args.tracker.rpartition(":")
        if not host or not port.isdecimal():
            parser.error(f"--tracker is {args.tracker!r}; it must be host:port")
        tracker = (host, int(port))
    import tvm  # noqa: F401  # before the fork, so that a new server is there at once

    context = multiprocessing.get_context("fork")
    _say(f"serving {args.key} at {args.host}:{args.port}")
    try:
        while True:
            started = time.monotonic()
            server = context.Process(target=_serve, args=(args.host, args.port, args.key, tracker))
            server.start()
            server.join()
            if time.monotonic() - started < _SERVED_S:
                _say(f"board_server: port {args.port} of {args.host} cannot be served")
                return 1
            _say("a session crashed; serving again")
    except KeyboardInterrupt:
        server.terminate()
        return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _serve(host: str, port: int, key: str, tracker: tuple[str, int] | None) -> None:
    """Serves until code in a session crashes: TVM's thread ends then, and this process with the client's socket."""
    import logging

    from tvm.rpc.server import PopenRPCServerState

    logging.getLogger("RPCServer").setLevel(logging.WARNING)
    PopenRPCServerState(host, port, port + 1, tracker_addr=tracker, key=key).thread.join()


if __name__ == "__main__":
    sys.exit(main())
