"""Artifacts whose libraries do what they should not."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compilers import manifest
from planish.compilers.linker import linker
from planish.compilers.manifest import EXAMPLES, Manifest, Port, digest
from planish.hwmodels.device import host


def seal(folder: Path, compiler: str = "tvm", **changes: Any) -> Path:
    """Writes the manifest of what is in the folder, checksums and all."""
    names = [path.name for path in folder.iterdir() if path.name != manifest.NAME]
    plain = Manifest(
        compiler=compiler,
        library="model.so",
        device="cpu",
        target={},
        threads=1,
        inputs=(Port("input", (1, 2), "float32"),),
        outputs=(Port("output", (1, 2), "float32"),),
        tolerance=1e-3,
        files={name: digest(folder / name) for name in names},
    )
    replace(plain, **changes).write(folder)
    return folder


def library(folder: Path, body: str) -> Path:
    """An artifact whose library does this when it is loaded."""
    compiler = linker(host())
    if compiler is None:
        pytest.skip("no C++ compiler to build a faulty library with")
    folder.mkdir()
    source = folder.parent / f"{folder.name}.cpp"
    source.write_text(
        "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void loaded() {{ {body} }}\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "model.so"), str(source)], check=True)
    zeros = np.zeros((1, 1, 2), np.float32)
    np.savez(folder / EXAMPLES, inputs=zeros, outputs=zeros)
    return seal(folder)
