"""`edit export`: take a bundle or model elsewhere. Thin: parse, then write, reload, compare and rename."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edit_cli import options as o
from edit_cli.console import print_result, two_columns, working
from edit_cli.errors import EditError, bad_input

FORMATS = {
    "bundle": "one safetensors file with a model card",
    "static": "a smaller model without routers",
    "torch-export": "the transformer as one .pt2 program",
}
"""What can be exported, and what comes out."""

APPLIES = {
    "--budget": ("static", "torch-export"),
    "--prompts": ("static", "torch-export"),
    "--images": ("static", "torch-export"),
    "--batch-size": ("torch-export",),
    "--text-tokens": ("torch-export",),
}
"""Formats that an option is for; it is refused with the others."""

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A bundle folder, or a model.")]
Format = Annotated[str, typer.Option("--format", metavar="F", help=f"One of: {', '.join(FORMATS)}.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the export goes.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export at --output.")]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="B", help="static, torch-export: share of the dense FLOPs to keep.", show_default=False
    ),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts", metavar="FILE", help="static, torch-export: prompts to freeze by.", show_default=False
    ),
]
Images = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="static, torch-export: pictures for mesh models.", show_default=False),
]
BatchSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="torch-export: rows of a call; default 1.", min=1, show_default=False),
]
TextTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="torch-export: text tokens of a call.", min=1, show_default=False),
]


def export(
    source: Source,
    format: Format = "bundle",
    output: Output = None,
    force: Force = False,
    budget: Budget = None,
    prompts: PromptsFile = None,
    images: Images = None,
    batch_size: BatchSize = None,
    text_tokens: TextTokens = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write routers or a model in a form that can be passed on, and check it by loading it again.

    [dim]edit export bundle -o my-routers
    edit export qwen-image-tiny --format static --budget 0.7 -o small[/dim]
    """
    if format not in FORMATS:
        raise EditError(f"--format {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    if output is None:
        raise EditError("no place to write to; give --output FOLDER")
    typed = {
        "--budget": budget, "--prompts": prompts, "--images": images, "--batch-size": batch_size,
        "--text-tokens": text_tokens,
    }  # fmt: skip
    for name, value in typed.items():
        if value is not None and format not in APPLIES[name]:
            raise EditError(
                f"{name} does not apply to --format {format}, only to {' and '.join(APPLIES[name])}; "
                "leave it out"
            )
    found, table = _run(
        format, source, output, force, budget, prompts, images, batch_size, text_tokens, quiet
    )
    print_result(found, table, json_output=json_output, quiet=quiet)


def _run(
    format: str, source: str, output: str, force: bool, budget: str | None, prompts: str | None,
    images: str | None, batch_size: int | None, text_tokens: int | None, quiet: bool,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """What was exported, as JSON data and for people."""
    if format == "bundle":
        from edit_cli import export_bundle

        with bad_input():
            found = export_bundle.export_bundle(source, output, force)
        return found, _bundle_table(found)
    from edit_cli.export_source import Request, parse_budget

    highest = "below 1" if format == "static" else "at most 1"
    request = Request(source, parse_budget(budget, highest), prompts, images)
    with bad_input(), working(f"exporting {source} ...", not quiet):
        if format == "static":
            from edit_cli import export_static

            found = export_static.export_static(request, output, force)
            return found, export_static.as_table(found)
        from edit_cli import export_torch

        found = export_torch.export_torch(request, output, force, batch_size or 1, text_tokens)
        return found, export_torch.as_table(found)


def _bundle_table(found: dict[str, Any]) -> Any:
    return two_columns(
        {
            "written": f"{found['output']} ({found['files'][0]}, {found['bytes'] / 2**20:.2f} MiB)",
            "checked": f"loaded again, largest difference {found['difference']:g}",
            "use": f"edit generate PROMPT --routers {found['output']}",
        }
    )
