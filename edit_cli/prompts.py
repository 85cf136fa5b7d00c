"""Read prompt files: one prompt a line, or JSON lines with per-picture overrides. Torch-free."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edit_cli import values
from edit_cli.errors import EditError

Entry = dict[str, Any]
"""Checked fields of one line: "prompt" and any overrides (values.FIELDS)."""


def read_prompts(source: str) -> list[Entry]:
    """Entries of a .txt or .jsonl file, or of stdin for "-" (JSON lines if it starts with "{").

    Blank lines are skipped. Raises EditError naming the file and line.
    """
    name = "stdin" if source == "-" else source
    lines = [(i, line) for i, line in enumerate(_read_text(source).splitlines(), 1) if line.strip()]
    if not lines:
        raise EditError(f"--prompts {name!r} holds no prompt; write one prompt a line")
    is_json = lines[0][1].lstrip().startswith("{") if source == "-" else Path(source).suffix == ".jsonl"
    if is_json:
        return [_parse_json(line, f"{name} line {i}") for i, line in lines]
    return [{"prompt": line.strip()} for _, line in lines]


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
