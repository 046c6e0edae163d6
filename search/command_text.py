"""A command as it is recorded: without the folders of the machine it was given on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, absolute paths shortened to what lies below the current folder, or to their last part."""
    return shlex.join(["planish", *(_short(argument) for argument in arguments)])


def _short(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    if not os.path.isabs(value):
        return argument
    relative = os.path.relpath(value)
    return name + equals + (os.path.basename(value) if relative.startswith("..") else relative)
