"""What the exported C++ program needs to know of its model: `model.h` and `example.bin`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..compilers.manifest import Manifest


def model_header(manifest: Manifest, classes: Sequence[str]) -> str:
    """`model.h`: library, input shape, threads and class names as C++ constants."""
    shape = ", ".join(str(size) for size in manifest.inputs[0].shape)
    names = "".join(f"    {c_string(name)},\n" for name in classes)
    return (
        "#pragma once\n\n#include <cstdint>\n#include <initializer_list>\n\nnamespace model {\n"
        f"constexpr const char* kLibrary = {c_string(manifest.library)};\n"
        f"constexpr std::initializer_list<int64_t> kShape = {{{shape}}};\n"
        f"constexpr const char* kThreads = {c_string(str(manifest.threads))};\n"
        f"constexpr const char* kClasses[] = {{\n{names}}};\n"
        "}  // namespace model\n"
    )


def c_string(text: str) -> str:
    """A C++ string literal of the text in UTF-8."""
    # Three octal digits end by themselves; hexadecimal escapes would swallow what follows. "?" may begin a trigraph.
    plain = set(range(0x20, 0x7F)) - set(b'"\\?')
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in text.encode("utf-8", "replace")) + '"'


def example_bytes(examples: Path) -> bytes:
    """The first stored input as raw little-endian floats."""
    with np.load(examples, allow_pickle=False) as stored:
        return np.ascontiguousarray(stored["inputs"][0], dtype="<f4").tobytes()
