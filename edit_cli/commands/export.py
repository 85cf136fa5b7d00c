"""`edit export`: take a bundle or model elsewhere."""

from __future__ import annotations

from edit_cli.console import print_result, working
from edit_cli.errors import EditError, bad_input
from edit_cli.export import write
from edit_cli.export.settings import APPLIES, Settings, budget_for, check_format
from edit_cli.options import EXPORT, REPORT
from edit_cli.request import Request, command


@command(EXPORT, REPORT)
def export(request: Request) -> None:
    """Write routers or a model in a form that can be passed on, and check it by loading it again.

    [dim]edit export bundle -o my-routers
    edit export qwen-image-tiny --format static --budget 0.7 -o small[/dim]
    """
    labels = {option.label: name for name, option in EXPORT.items()}
    check_format(request["format"], {label: request.get(labels[label]) for label in APPLIES})
    if "output" not in request:
        raise EditError("no place to write to; give --output FOLDER")
    settings = Settings(
        source=request["source"],
        output=request["output"],
        format=request["format"],
        force="force" in request,
        budget=budget_for(request["format"], request.get("budget")),
        prompts=request.get("prompts_file"),
        images=request.get("images"),
        batch_size=request.get("batch_size", 1),
        text_tokens=request.get("text_tokens"),
        dtype=request.get("dtype", "auto"),
        shard_size=request.get("shard_size"),
    )
    with bad_input(), working(f"opening {settings.source}", "quiet" not in request) as say:
        written = write.export(settings, say)
    print_result(written, write.as_table(written), request)
