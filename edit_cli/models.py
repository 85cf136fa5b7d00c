"""`edit models`: what can be generated with. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from backbones import mesh_registry, registry
from backbones.spec import Backbone, MeshBackbone
from edit_cli.console import print_json, stdout


def models(
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """List the models known by name; other pipeline folders and hub ids of these families work too."""
    rows: list[Backbone | MeshBackbone] = [*registry.rows().values(), *mesh_registry.rows().values()]
    if json_output:
        print_json(
            {
                "default": registry.DEFAULT_MODEL,
                "default_3d": mesh_registry.DEFAULT_MESH_MODEL,
                "models": [as_dict(row) for row in rows],
            }
        )
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for name in ("parameters", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("weights", "routers"):
        table.add_column(name, no_wrap=True)
    table.add_column("licence")
    for row in rows:
        table.add_row(
            f"[bold]{row.name}[/]",
            readable_count(row.parameters),
            f"{row.memory_gib:g} GiB",
            "[green]packaged[/]" if row.packaged else "hub",
            "[green]packaged[/]" if row.bundle else "-",
            escape(row.licence),
        )
    stdout().print(table)
    stdout().print("[dim]memory: all weights in bf16 (small models fp32); --offload needs less[/]")


def as_dict(row: Backbone | MeshBackbone) -> dict[str, Any]:
    """A registry row for scripts."""
    made: dict[str, Any] = {"makes": "pictures"}
    if isinstance(row, MeshBackbone):
        made = {"makes": "meshes", "octree_resolution": row.defaults.octree_resolution, "views": row.views}
    else:
        made |= {"width": row.defaults.width, "height": row.defaults.height}
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


def readable_count(n: int) -> str:
    """20430401088 -> "20.4 B"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
