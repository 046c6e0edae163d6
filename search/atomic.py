"""Files that are either the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from .errors import file_mistakes
from .trial import finite


def write_text(path: Path, text: str, advice: str = "free space or choose another folder") -> None:
    """Replaces a file by the text: a temporary file in the same folder, fsync, rename.

    Args:
        path: Its folder must exist.
        text: Written as UTF-8.
        advice: What the user can do; ends the message where the disk is full or read-only.

    Raises:
        UserError: the disk is full, or the folder is read-only or not the user's.
    """
    with file_mistakes(str(path), advice):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            share(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: object, advice: str = "free space or choose another folder") -> None:
    """`write_text` of an indented JSON document; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", advice)


def sync_folder(folder: Path) -> None:
    """Makes the creation or renaming of a file in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def share(file: str) -> None:
    """The rights of any new file: mkstemp makes its files private, and a run's folder is read by others too."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)
