"""Mistakes of the user's: one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What the user can put right, in one line that names the thing, its value, what is allowed and what to do next."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: `did you mean 'trials'? known are batch, trials`.

    The suggestion is left out where no known name is close.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known are {', '.join(names)}"


@contextmanager
def file_mistakes(what: str, advice: str) -> Iterator[None]:
    """Turns a full disk, a missing right or a read-only folder into a `UserError`; other errors pass.

    Args:
        what: What was being written, for instance `runs/mine/front.json`.
        advice: What was kept and how to carry on.
    """
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file may not grow further",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.EISDIR: "a folder is in the way",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise UserError(f"cannot write {what}: {reasons[error.errno]}; {advice}") from error
