"""`edit export`: take a bundle or model elsewhere. Thin: parse, then write, reload, compare and rename."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from backbones.spec import DTYPES
from edit_cli import checks as values
from edit_cli import options as o
from edit_cli.console import print_result, two_columns, working
from edit_cli.errors import EditError, bad_input

Made = tuple[dict[str, Any], Any]
"""What was exported, as JSON data and for people."""


@dataclass(frozen=True)
class Typed:
    """The command line."""

    source: str
    output: str
    force: bool
    budget: str | None
    prompts: str | None
    images: str | None
    batch_size: int | None
    text_tokens: int | None
    dtype: str | None
    shard_size: str | None

    def request(self, highest: str | None) -> Any:
        """An `export_source.Request`. highest: of the budget, for formats that freeze one."""
        from edit_cli.export.source import Request, parse_budget

        budget = 1.0 if highest is None else parse_budget(self.budget, highest)
        return Request(
            self.source, budget, self.prompts, self.images, dtype=self.dtype or "auto",
            shard_size=self.shard_size,
        )  # fmt: skip


def _bundle(typed: Typed) -> Made:
    from edit_cli.export.bundle import export_bundle

    found = export_bundle(typed.source, typed.output, typed.force)
    return found, two_columns(
        {
            "written": f"{found['output']} ({found['files'][0]}, {found['bytes'] / 2**20:.2f} MiB)",
            "checked": f"loaded again, largest difference {found['difference']:g}",
            "use": f"edit generate PROMPT --routers {found['output']}",
        }
    )


def _reference(typed: Typed) -> Made:
    from edit_cli.export import reference as to

    found = to.export_reference(
        typed.source, typed.output, typed.force, typed.dtype or "auto", typed.shard_size
    )
    return found, to.as_table(found)


def _diffusers(typed: Typed) -> Made:
    request = typed.request(None)
    from edit_cli.export import diffusers_folder as to

    found = to.export_diffusers(request, typed.output, typed.force)
    return found, to.as_table(found)


def _static(typed: Typed) -> Made:
    request = typed.request("below 1")
    from edit_cli.export import static as to

    found = to.export_static(request, typed.output, typed.force)
    return found, to.as_table(found)


def _torch_export(typed: Typed) -> Made:
    request = typed.request("at most 1")
    from edit_cli.export import program as to

    found = to.export_torch(request, typed.output, typed.force, typed.batch_size or 1, typed.text_tokens)
    return found, to.as_table(found)


FORMATS: dict[str, Callable[[Typed], Made]] = {
    "bundle": _bundle,
    "reference": _reference,
    "diffusers": _diffusers,
    "static": _static,
    "torch-export": _torch_export,
}
FREEZING, MODELS = ("static", "torch-export"), ("diffusers", "static", "torch-export")
APPLIES = {
    "--budget": FREEZING,
    "--prompts": MODELS,
    "--images": MODELS,
    "--batch-size": ("torch-export",),
    "--text-tokens": ("torch-export",),
    "--dtype": ("reference", *MODELS),
    "--shard-size": ("reference", "diffusers", "static"),
}
"""Formats that an option is for; it is refused with the others."""
SIZE = re.compile(r"[1-9]\d*(\.\d+)?[KMGT]B")


def _for(option: str, text: str) -> str:
    return f"{', '.join(APPLIES[option])}: {text}"


Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A bundle folder, a model, or a checkpoint of the paper's.")
]
Format = Annotated[str, typer.Option("--format", metavar="F", help=f"One of: {', '.join(FORMATS)}.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the export goes.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export at --output.")]
Budget = Annotated[
    str | None,
    typer.Option(metavar="B", help=_for("--budget", "share of the dense FLOPs to keep."), show_default=False),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts", metavar="FILE", help=_for("--prompts", "prompts to measure on."), show_default=False
    ),
]
Images = Annotated[
    str | None,
    typer.Option(metavar="DIR", help=_for("--images", "pictures, for mesh models."), show_default=False),
]
BatchSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="torch-export: rows of a call; default 1.", min=1, show_default=False),
]
TextTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="torch-export: text tokens of a call.", min=1, show_default=False),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help=_for("--dtype", f"{', '.join(DTYPES)}."), show_default=False),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help=_for("--shard-size", "most of a weight file, like 5GB."), show_default=False
    ),
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
    dtype: Dtype = None,
    shard_size: ShardSize = None,
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
    given = {
        "--budget": budget, "--prompts": prompts, "--images": images, "--batch-size": batch_size,
        "--text-tokens": text_tokens, "--dtype": dtype, "--shard-size": shard_size,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and format not in APPLIES[name]:
            raise EditError(
                f"{name} does not apply to --format {format}, only to {', '.join(APPLIES[name])}; "
                "leave it out"
            )
    if dtype is not None:
        values.one_of("--dtype", dtype, DTYPES)
    if shard_size is not None and not SIZE.fullmatch(shard_size):
        raise EditError(f"--shard-size {shard_size!r} is no size; give a number with a unit, like 5GB")
    typed = Typed(source, output, force, budget, prompts, images, batch_size, text_tokens, dtype, shard_size)
    with bad_input(), working(f"exporting {source} ...", not quiet):
        found, table = FORMATS[format](typed)
    print_result(found, table, json_output=json_output, quiet=quiet)
