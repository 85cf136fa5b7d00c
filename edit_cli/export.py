"""`edit export`: take a bundle elsewhere. Thin: parse, write beside the target, reload, compare, rename."""

from __future__ import annotations

from typing import Annotated

import typer

from edit_cli import options as o
from edit_cli.console import print_json, stderr, stdout, two_columns
from edit_cli.errors import EditError, bad_input

FORMATS = {"bundle": "one safetensors file with a model card"}
"""What can be exported, and what comes out."""

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A bundle folder, or a model that has one.")]
Format = Annotated[str, typer.Option("--format", metavar="F", help=f"One of: {', '.join(FORMATS)}.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the export goes.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export at --output.")]


def export(
    source: Source,
    format: Format = "bundle",
    output: Output = None,
    force: Force = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write routers in a form that can be passed on, and check it by loading it again.

    [dim]edit export bundle -o my-routers
    edit generate "a cat" --routers my-routers --budget 0.5[/dim]
    """
    if format not in FORMATS:
        raise EditError(f"--format {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    if output is None:
        raise EditError("no place to write to; give --output FOLDER")
    from edit_cli import export_bundle

    with bad_input():
        found = export_bundle.export_bundle(source, output, force)
    if not quiet:
        rows = {
            "written": f"{found['output']} ({found['files'][0]}, {found['bytes'] / 2**20:.2f} MiB)",
            "checked": f"loaded again, largest difference {found['difference']:g}",
            "use": f"edit generate PROMPT --routers {found['output']}",
        }
        (stderr() if json_output else stdout()).print(two_columns(rows))
    if json_output:
        print_json(found)
