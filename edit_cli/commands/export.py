"""`edit export`: take a bundle or model elsewhere. Thin: parse, then write, reload, compare and rename."""

from __future__ import annotations

from typing import Annotated

import typer

from backbones.spec import DTYPES
from edit_cli import checks as values
from edit_cli import options as o
from edit_cli.console import print_result, working
from edit_cli.errors import EditError, bad_input
from edit_cli.export import write
from edit_cli.export.settings import APPLIES, FORMATS, Settings, budget_for, check_format
from edit_cli.export.settings import shard_size as check_shard_size


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
    given = {
        "--budget": budget, "--prompts": prompts, "--images": images, "--batch-size": batch_size,
        "--text-tokens": text_tokens, "--dtype": dtype, "--shard-size": shard_size,
    }  # fmt: skip
    check_format(format, given)
    if output is None:
        raise EditError("no place to write to; give --output FOLDER")
    settings = Settings(
        source, output, format, force, budget_for(format, budget), prompts, images, batch_size or 1,
        text_tokens, values.one_of("--dtype", dtype or "auto", DTYPES), check_shard_size(shard_size),
    )  # fmt: skip
    with bad_input(), working(f"opening {source}", not quiet) as say:
        written = write.export(settings, say)
    print_result(written, write.as_table(written), json_output=json_output, quiet=quiet)
