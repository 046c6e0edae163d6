"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic import sync_folder
from .errors import UserError, file_mistakes

_PREFIX = ".planish-new-"


@contextmanager
def new_folder(out: Path, last: str) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; when the block ends well, what it holds is in `out`, else nothing is.

    Args:
        out: Must not exist, or be an empty folder; that one is kept, as it may be a mount point or somebody's current
            folder: it gets the files one by one.
        last: The file that then comes last, without which the folder counts as unfinished.

    Raises:
        UserError: `out` is in use, the disk is full, or it cannot be written.
    """
    place = Path(os.path.realpath(out))
    there = os.path.isdir(place)
    if os.path.exists(place) and not there:
        raise UserError(f"{out} is a file; name a new folder with --out")
    with file_mistakes(str(out), "free space or choose another folder with --out; nothing was left there"):
        if there and (found := sorted(p.name for p in place.iterdir() if not p.name.startswith(_PREFIX))):
            raise UserError(f"{out} is not empty (it holds {found[0]}); name a new folder with --out")
        parent = place if there else place.parent
        temporary = _make(parent, out)
        try:
            yield temporary
            _sync(temporary)
            if there:
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                    path.rename(place / path.name)
            else:
                _rename(temporary, place, out)
            sync_folder(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _make(parent: Path, out: Path) -> Path:
    # Not mkdtemp, whose folders are private: an export is for others too.
    temporary = parent / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}; name another folder with --out") from error
    return temporary


def _rename(temporary: Path, place: Path, out: Path) -> None:
    try:
        temporary.rename(place)
    except OSError as error:
        taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
        reason = "another process has made it meanwhile" if taken else error.strerror
        raise UserError(f"cannot make {out}: {reason}; name another folder with --out") from error


def _sync(folder: Path) -> None:
    """Brings everything to the disk, so that a power cut after the renaming leaves no empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
