"""The command line: 0 on success, 2 for a mistake of the user's in one line, 1 for a fault of planish's own."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ..compilers.remote import DeviceLost
from .command_text import command_line
from .commands import COMMANDS, Output
from .errors import UserError, nearest
from .spec_defaults import KEYS

_MISTAKE, _FAULT, _INTERRUPTED, _PIPE = 2, 1, 130, 141
# What is wrong with a path that somebody named, and not with planish.
_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None: the process's.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = argparse.Namespace(debug="--debug" in given, json="--json" in given)
    try:
        parser().parse_args(given, arguments)
        logging.basicConfig(level=logging.DEBUG if arguments.debug else logging.WARNING, format="%(message)s")
        with _only_results_on_stdout(arguments.json):
            output = COMMANDS[arguments.command](arguments, command_line(given))
        _show(output, arguments.json)
    except (UserError, DeviceLost) as error:
        return _fail(error, arguments)
    except ValueError as error:
        return _fail(error, arguments) if _is_ours(error) else _fault(error, arguments)
    except KeyboardInterrupt:
        run = getattr(arguments, "run", None)
        resumable = arguments.command in ("search", "resume") and (run / "spec.toml").exists() if run else False
        _say(f"stopped; carry on with: planish resume {run}" if resumable else "stopped")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; without this, Python complains again when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE
    except OSError as error:
        if error.filename is None or error.errno not in _PATHS:
            return _fault(error, arguments)
        advice = "name another path, or change its rights"
        return _fail(UserError(f"{error.filename}: {error.strerror}; {advice}"), arguments)
    except Exception as error:
        return _fault(error, arguments)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; a mistake raises UserError."""
    top = _Parser(prog="planish", description="Makes a trained torch model fit a device.", allow_abbrev=False)
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="the result as JSON on stdout, and nothing else there")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error, and debug logs")
        return sub

    sub = command("search", "search for compressed models that keep a budget on a device")
    _add_keys(sub)
    sub.add_argument("--out", type=Path, metavar="RUN", help="the run's folder; an unfinished run there is carried on")
    sub = command("resume", "carry on with a run that was stopped")
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--workers", type=int, metavar="N", help=KEYS["workers"].help)
    sub.add_argument(
        "--train-only", action="store_true", help="train what is left, on whatever processor; time nothing"
    )
    sub = command("status", "show how far a run is and the best so far")
    sub.add_argument("run", type=Path, metavar="RUN")
    sub = command("report", "write RUN/report.html, one page that holds everything about a run")
    sub.add_argument("run", type=Path, metavar="RUN")
    sub = command("export", "write one model of the front, compiled and ready to run")
    sub.add_argument("run", type=Path, metavar="RUN")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--pick", metavar="BUDGET", help='the most accurate that keeps it, for instance "latency<=0.4x"')
    which.add_argument("--trial", type=int, metavar="N", help="this trial")
    sub.add_argument("--out", type=Path, metavar="DIR", required=True)
    sub = command("profile", "show what every layer costs, what can be reached, and what cannot get faster and why")
    _add_keys(sub)
    sub.add_argument("--no-table", action="store_true", help="do not measure kernels for a latency model")
    sub.add_argument("--tiles", action="store_true", help="measure how the model's convolutions are computed fastest")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures")
    sub = command("devices", "list every known device: usable here, or what is missing")
    held = sub.add_mutually_exclusive_group()
    held.add_argument("--table", action="store_true", help="what is known of measured kernels, by device")
    held.add_argument("--export", type=Path, metavar="FILE", dest="export_to", help="write all kernel times to a file")
    held.add_argument("--import", type=Path, metavar="FILE", dest="import_from", help="add the kernel times of a file")
    sub = command("bench", "load an artifact, check it against its stored outputs, and time it")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--runs", type=int, metavar="N", help="timed runs")
    return top


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as UserError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, unknown = super().parse_known_args(args, namespace)
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        if flags:
            raise UserError(f"unknown flag {flags[0]}; {nearest(flags[0], self._option_string_actions)}")
        return found, unknown


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"planish {version('planish')}")
        parser.exit()


def _add_keys(sub: argparse.ArgumentParser) -> None:
    """A specification file and the keys of its top level as flags; --set reaches every key."""
    sub.add_argument("spec", nargs="?", type=Path, metavar="SPEC.toml", help="flags go before what it says")
    for key, entry in KEYS.items():
        if "." in key:
            continue
        text = entry.help + (f" ({', '.join(entry.allowed)})" if entry.allowed else "")
        if entry.kind == "texts":
            sub.add_argument(
                f"--{key}", action="append", metavar=key.upper(), help=f"{text.replace('%', '%%')}; repeatable"
            )
        else:
            kind = int if entry.kind == "integer" else str
            sub.add_argument(f"--{key}", type=kind, metavar=key.upper(), help=text.replace("%", "%%"))
    sub.add_argument("--set", action="append", metavar="KEY=VALUE", help="any key, for instance search.trials=64")


@contextmanager
def _only_results_on_stdout(wanted: bool) -> Iterator[None]:
    """Sends what libraries and child processes write to stdout to stderr meanwhile."""
    if not wanted:
        yield
        return
    stdout, kept = sys.stdout, os.dup(1)
    stdout.flush()
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        sys.stdout = stdout


def _show(output: Output, as_json: bool) -> None:
    from .trial import finite

    print(json.dumps(finite(output.result), indent=2, ensure_ascii=False) if as_json else output.text)
    sys.stdout.flush()


def _is_ours(error: ValueError) -> bool:
    """Whether planish itself raised it about something it was given, and not numpy or torch about planish's doing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("planish.")


def _fail(error: Exception, arguments: argparse.Namespace) -> int:
    if arguments.debug:
        traceback.print_exception(error)
    _say(str(error))
    return _MISTAKE


def _fault(error: Exception, arguments: argparse.Namespace) -> int:
    what = f"internal error, {type(error).__name__}: {error}"
    if arguments.debug:
        traceback.print_exception(error)
        _say(what)
        return _FAULT
    try:
        handle, path = tempfile.mkstemp(prefix="planish-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        _say(f"{what} (the traceback could not be written; --debug shows it)")
    else:
        _say(f"{what} (traceback in {path})")
    return _FAULT


def _say(text: str) -> None:
    """One line on stderr."""
    print(f"planish: {' '.join(text.split())}", file=sys.stderr)
