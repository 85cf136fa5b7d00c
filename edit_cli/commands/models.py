"""`edit models`: what can be generated with. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones import registry
from backbones.spec import COMMANDS, Backbone
from edit_cli.console import print_json, readable_count, stdout
from edit_cli.errors import bad_input
from edit_cli.options import LISTING
from edit_cli.request import Request, command

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


SIZES, MORE = ("width", "height"), {"video": ("frames", "fps"), "sound": ("seconds",)}
"""Defaults that are listed of a model, by what it makes."""
NAME_WIDTH = 24  # columns: the longest name with its indent


@command(LISTING)
def models(request: Request) -> None:
    """List the models known by name; any diffusers pipeline with a transformer works too.

    [dim]edit models --inspect FOLDER[/dim]
    """
    if "inspect" in request:
        inspect(request)
        return
    rows = list(registry.rows().values())
    if "json" in request:
        print_json(
            {
                "default": registry.DEFAULT_MODELS["picture"],
                "default_3d": registry.DEFAULT_MODELS["mesh"],
                "models": [as_dict(row) for row in rows],
            }
        )
        return
    for (family, licence), group in groupby(rows, lambda row: (row.family.name, row.licence)):
        stdout().print(_heading(family, licence))
        stdout().print(_table(list(group)))
    stdout().print(
        "[dim]memory: all weights in bf16 (small models fp32)\n"
        "folders and hub ids of any diffusers pipeline with a transformer work too[/]"
    )


def inspect(request: Request) -> None:
    """What can be controlled in a folder's transformers, from their configurations. Raises EditError."""
    with bad_input():
        from backbones.inspect import inspect_folder

        found = inspect_folder(Path(request["inspect"]).expanduser())
    if "json" in request:
        print_json({"transformers": [asdict(inspection) for inspection in found]})
        return
    from rich.table import Table
    from rich.text import Text

    for inspection in found:
        stdout().print(Text.assemble((inspection.component, "bold"), f"  {inspection.transformer}"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("list", "block", "streams -> returned at", "time", "MLPs"):
            table.add_column(name, overflow="fold")
        for row in inspection.rows:
            table.add_row(*map(Text, (row.path, row.block, row.streams, row.time, row.mlps)))
        stdout().print(table)
        for path, reason in inspection.left_in_full.items():
            stdout().print(Text(f"runs in full: {path} ({reason})", style="dim"))
        for note in inspection.notes:
            stdout().print(Text(note, style="dim"))


def _heading(family: str, licence: str) -> Text:
    from rich.text import Text

    return Text.assemble((family, "bold"), (f"  {licence}", "dim"))


def _table(rows: Sequence[Backbone]) -> Table:
    """Models of one family and licence; narrow enough for a terminal of 60 columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=NAME_WIDTH, no_wrap=True)
    for width in (7, 8):
        table.add_column(min_width=width, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        routers = ", with routers" if row.bundle else ""
        table.add_row(
            f"  {row.name}",
            readable_count(row.parameters or row.transformer_parameters),
            f"{row.memory_gib:g} GiB" if row.parameters else "",
            f"[green]packaged{routers}[/]" if row.packaged else "hub",
        )
    return table


def as_dict(row: Backbone) -> dict[str, Any]:
    """A registry row for scripts."""
    made: dict[str, Any] = {"makes": COMMANDS[row.makes][0]}
    fields = ("octree_resolution",) if row.makes == "mesh" else (*SIZES, *MORE.get(row.makes, ()))
    made |= {name: getattr(row.defaults, name) for name in fields}
    made |= {"views": row.views} if row.makes == "mesh" else {}
    return {
        "name": row.name,
        "family": row.family.name,
        "source": "packaged" if row.packaged else row.source,
        "packaged": row.packaged,
        "parameters": row.parameters,
        "transformer_parameters": row.transformer_parameters,
        "memory_gib": row.memory_gib,
        "licence": row.licence,
        "routers": row.bundle is not None,
        **made,
        "steps": row.defaults.steps,
        "guidance": row.defaults.guidance,
        "summary": row.summary,
    }
