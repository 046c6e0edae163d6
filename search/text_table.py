"""Results as text for a terminal: aligned tables and key-value lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; columns of numbers alone stand to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(header)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(header), *cells]
    ]
    return "\n".join(lines)


def text_of(value: Mapping[str, object], indent: str = "") -> str:
    """A JSON object as lines: `key: value`, lists of objects as tables, objects indented; None is left out."""
    parts: list[str] = []
    for key, item in value.items():
        name = key.replace("_", " ")
        if isinstance(item, Mapping) and item:
            parts.append(f"{indent}{name}:\n{text_of(item, indent + '  ')}")
        elif isinstance(item, (list, tuple)) and item and all(isinstance(entry, Mapping) for entry in item):
            columns = list(dict.fromkeys(column for entry in item for column in entry))
            rows = [[entry.get(column) for column in columns] for entry in item]
            body = text_table([column.replace("_", " ") for column in columns], rows)
            parts.append(f"{indent}{name}:\n" + "\n".join(f"{indent}  {line}" for line in body.splitlines()))
        elif item is not None and not isinstance(item, Mapping):
            parts.append(f"{indent}{name}: {_cell(item)}")
    return "\n".join(parts)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
