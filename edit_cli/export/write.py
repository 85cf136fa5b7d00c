"""Write an export: open its source, fill a folder beside the target, check it, rename it.

A format is a module with these functions (`settings.FORMATS`):

    open_source(request, say)                what to export; formats of a model share that of source.py
    fill(source, request, folder, say)       write the files, load them again, compare; returns the facts
    model_card(facts, source, name)          README.md
    as_table(facts)                          what people see
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from edit_cli import __version__
from edit_cli.errors import EditError
from edit_cli.export.folder import MANIFEST, write_manifest, written
from edit_cli.export.settings import APPLIES, FORMATS, FREEZING, MODELS
from edit_cli.files import ANY, claimed_folder, request_hash, whole_folder
from edit_cli.options import EXPORT
from edit_cli.request import Request

Say = Callable[[str], None]
"""Called with what is being done, for people who wait."""


def check_export(request: Request) -> None:
    """Refuse options that do not go with the format. Raises EditError."""
    form = request["format"]
    for name, option in EXPORT.items():
        forms = APPLIES.get(option.label, ())
        if name in request and forms and form not in forms:
            raise EditError(
                f"{option.label} does not apply to --format {form}, only to {', '.join(forms)}; leave it out"
            )
    if "output" not in request:
        raise EditError("no place to write to; give --output FOLDER")
    if form in FREEZING and "budget" not in request:
        raise EditError("this format freezes one budget; give --budget B, like --budget 0.7")
    if form == "static" and request["budget"] == 1:
        raise EditError("--budget 1 leaves nothing out; give a --budget below 1, like 0.7")


def export(request: Request, say: Say = lambda text: None) -> dict[str, Any]:
    """Write the folder `output`. Returns what was written, as JSON data.

    Raises EditError or ValueError for bad input, RunError if what was written is not what was read.
    """
    form, output, asked = request["format"], request["output"], request_hash(request)
    may_replace = (asked, ANY) if "overwrite" in request else (asked,)
    with claimed_folder(output, "export", MANIFEST, may_replace) as target:
        module = _module(form)
        opening = importlib.import_module("edit_cli.export.source") if form in MODELS else module
        source = opening.open_source(request, say)
        with whole_folder(target, written(target)) as folder:
            facts = {"format": form, "edit": __version__, **module.fill(source, request, folder, say)}
            card = module.model_card(facts, source, target.name)
            (folder / "README.md").write_text(card, encoding="utf-8")
            files = write_manifest(folder, {"request_hash": asked, **facts})
    size = sum(file["bytes"] for file in files.values())
    return {"output": output, **facts, "files": [*files], "bytes": size}


def as_table(facts: dict[str, Any]) -> Any:
    """What was written, for people."""
    return _module(facts["format"]).as_table(facts)


def _module(form: str) -> Any:
    return importlib.import_module(f"edit_cli.export.{FORMATS[form]}")
