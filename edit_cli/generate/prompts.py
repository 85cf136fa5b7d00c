"""Read prompt files: one prompt a line, or JSON lines with per-picture overrides. Torch-free."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from backbones.spec import PACKAGE_FOLDER, Backbone
from edit_cli import checks as values
from edit_cli.errors import EditError

Entry = dict[str, Any]
"""Checked fields of one line: "prompt" and any overrides (values.FIELDS)."""


def read_prompts(source: str) -> list[Entry]:
    """Entries of a .txt or .jsonl file, or of stdin for "-" (JSON lines if it starts with "{").

    Blank lines are skipped. Raises EditError naming the file and line.
    """
    name = "stdin" if source == "-" else source
    suffix = Path(source).suffix.lower()
    if suffix in (".json", ".csv", ".yaml", ".yml"):
        raise EditError(
            f"--prompts {name!r} is a {suffix} file; give one prompt a line (.txt), "
            'or one JSON object a line (.jsonl): {"prompt": "a cat", "seed": 1}'
        )
    # not splitlines: JSON strings may hold the other characters that it takes for line ends
    lines = [(i, line) for i, line in enumerate(_read_text(source).split("\n"), 1) if line.strip()]
    if not lines:
        raise EditError(f"--prompts {name!r} holds no prompt; write one prompt a line")
    is_json = lines[0][1].lstrip().startswith("{") if source == "-" else suffix == ".jsonl"
    if is_json:
        return [_parse_json(line, f"{name} line {i}") for i, line in lines]
    return [{"prompt": values.prompt(f"{name} line {i}: prompt", line.strip())} for i, line in lines]


def default_prompts(backbone: Backbone) -> Path:
    """A model's own calibration prompts (`calibration.txt` in its folder), else the packaged general ones."""
    own = backbone.folder / "calibration.txt" if backbone.folder is not None else None
    return own if own is not None and own.is_file() else PACKAGE_FOLDER / "configs" / "calibration.txt"


def _read_text(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(
            f"--prompts {source!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise EditError(
            f"--prompts {source!r} cannot be read: {reason}; give a .txt or .jsonl file, or -"
        ) from None


def _parse_json(line: str, where: str) -> Entry:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise EditError(f'{where} is not JSON ({error}); write {{"prompt": "a cat", "seed": 1}}') from None
    if not isinstance(data, dict):
        raise EditError(f'{where} is not a JSON object; write {{"prompt": "a cat", "seed": 1}}')
    if "prompt" not in data:
        raise EditError(f'{where} has no "prompt"; write {{"prompt": "a cat", "seed": 1}}')
    return values.checked(data, where + ": {}")
