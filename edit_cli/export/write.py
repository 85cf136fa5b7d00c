"""Write an export: open its source, fill a folder beside the target, check it, rename it.

A format is a module with these functions (`settings.FORMATS`):

    open_source(settings, say)               what to export; formats of a model share that of source.py
    fill(source, settings, folder, say)      write the files, load them again, compare; returns the facts
    model_card(facts, source, name)          README.md
    as_table(facts)                          what people see
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edit_cli import __version__
from edit_cli.export.folder import check_target, new_folder, write_manifest
from edit_cli.export.settings import FORMATS, MODELS, Settings

Say = Callable[[str], None]
"""Called with what is being done, for people who wait."""


def export(settings: Settings, say: Say = lambda text: None) -> dict[str, Any]:
    """Write `settings.output`. Returns what was written, as JSON data.

    Raises EditError or ValueError for bad input, RunError if what was written is not what was read.
    """
    check_target(settings.output, settings.force)
    module, name = _module(settings.format), Path(settings.output).name
    opening = importlib.import_module("edit_cli.export.source") if settings.format in MODELS else module
    source = opening.open_source(settings, say)
    with new_folder(settings.output, settings.force) as folder:
        facts = {"format": settings.format, "edit": __version__}
        facts |= module.fill(source, settings, folder, say)
        (folder / "README.md").write_text(module.model_card(facts, source, name), encoding="utf-8")
        files = write_manifest(folder, facts)
    size = sum(file["bytes"] for file in files.values())
    return {"output": settings.output, **facts, "files": [*files], "bytes": size}


def as_table(facts: dict[str, Any]) -> Any:
    """What was written, for people."""
    return _module(facts["format"]).as_table(facts)


def _module(format: str) -> Any:
    return importlib.import_module(f"edit_cli.export.{FORMATS[format]}")
