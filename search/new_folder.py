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
    if place.exists() and not place.is_dir():
        raise UserError(f"{out} is a file; name a new folder with --out")
    with file_mistakes(str(out), "free space or choose another folder with --out; nothing was left there"):
        if place.is_dir() and (found := sorted(p.name for p in place.iterdir() if not p.name.startswith(_PREFIX))):
            raise UserError(f"{out} is not empty (it holds {found[0]}); name a new folder with --out")
        there = place.is_dir()
        parent = place if there else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        # Not mkdtemp, whose folders are private: an export is for others too.
        temporary = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        temporary.mkdir()
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


def _rename(temporary: Path, place: Path, out: Path) -> None:
    try:
        temporary.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{out} was made by another process meanwhile; name a new folder with --out") from error


def _sync(folder: Path) -> None:
    """Brings everything to the disk, so that a power cut after the renaming leaves no empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
