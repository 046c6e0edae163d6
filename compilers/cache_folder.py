"""Where planish keeps what it can make again, shared by all runs of a user."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`$PLANISH_CACHE`, or `planish` in the platform's cache folder; it may not exist yet."""
    named = os.environ.get("PLANISH_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "planish"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "planish"
