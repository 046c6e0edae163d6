"""`python -m planish.search.picture RUN FRONT.svg`: the picture of a run's front as a file of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from .atomic import write_text
from .pictures import front_svg
from .rundir import RunDirectory


def write_picture(run: Path, out: Path) -> None:
    """Writes the front of a run as SVG.

    Raises:
        UserError: there is no run in the folder, it has no front yet, or the file cannot be written.
    """
    folder = RunDirectory.open(run)
    write_text(out, front_svg(folder.front(), folder.trials()))


if __name__ == "__main__":
    write_picture(Path(sys.argv[1]), Path(sys.argv[2]))
