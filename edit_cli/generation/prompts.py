"""Read lists of what to make: one a line, or JSON lines with overrides. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.spec import PACKAGE_FOLDER, Backbone
from edit_cli.errors import EditError
from edit_cli.files import reason
from edit_cli.generation.medium import Fields, Medium
from edit_cli.generation.picture import PICTURE


def read_lines(source: str, medium: Medium, option: str = "--prompts") -> list[Fields]:
    """Checked fields of each line of a .txt or .jsonl file, or of stdin for "-" (JSON if it starts with "{").

    Blank lines are skipped, and those that begin with "#". option: what messages call the file. Raises
    EditError naming the file and line.
    """
    name, subject = "stdin" if source == "-" else source, medium.subject
    suffix = Path(source).suffix.lower()
    if suffix in (".json", ".csv", ".yaml", ".yml"):
        raise EditError(
            f"{option} {name!r} is a {suffix} file; give one {subject} a line (.txt), "
            f"or one JSON object a line (.jsonl): {medium.example}"
        )
    # not splitlines: JSON strings may hold the other characters that it takes for line ends
    lines = [(i, line) for i, line in enumerate(_read_text(source, option).split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise EditError(f"{option} {name!r} is empty; write one {subject} a line")
    is_json = lines[0][1].lstrip().startswith("{") if source == "-" else suffix == ".jsonl"
    if is_json:
        return [_parse_json(line, f"{name} line {i}", medium) for i, line in lines]
    what = medium.options[subject]
    return [{subject: what.value(f"{name} line {i}: {subject}", line.strip())} for i, line in lines]


def read_prompts(source: str) -> list[Fields]:
    """A list of prompts, with what may stand beside them."""
    return read_lines(source, PICTURE)


def default_prompts(backbone: Backbone) -> Path:
    """A model's own calibration prompts (`calibration.txt` in its folder), else the packaged general ones."""
    own = backbone.folder / "calibration.txt" if backbone.folder is not None else None
    return own if own is not None and own.is_file() else PACKAGE_FOLDER / "configs" / "calibration.txt"


def _read_text(source: str, option: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(
            f"{option} {source!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise EditError(
            f"{option} {source!r} cannot be read: {reason(error)}; give a .txt or .jsonl file, or -"
        ) from None


def _parse_json(line: str, where: str, medium: Medium) -> Fields:
    """An object's fields; null stands for what is not given, except for what every line needs."""
    import routers.schema as schema  # a list of plain prompts does without

    try:
        data = schema.decode(line, dict[str, Any], where)
    except ValueError as error:
        raise EditError(f"{error}; write {medium.example}") from None
    return checked_fields(data, where, medium)


def checked_fields(data: Mapping[str, Any], where: str, medium: Medium) -> Fields:
    """What is said of one result, checked. Raises EditError, which begins with `where`."""
    if data.get(medium.subject) is None:
        lacks = "is null" if medium.subject in data else "is missing"
        raise EditError(f'{where}: "{medium.subject}" {lacks}; write {medium.example}')
    unknown = sorted(set(data) - set(medium.options))
    if unknown:
        raise EditError(f"{where}: {unknown[0]} is unknown; allowed are {', '.join(medium.options)}")
    fields: Fields = {}
    for name, value in data.items():
        option = medium.options[name]
        if isinstance(value, list) and option.line != "list":
            raise EditError(f"{where}: {name} {value!r} is a list; give one value a line")
        if value is not None:
            fields[name] = option.value(f"{where}: {name}", value)
    return fields
