"""`edit export`: take a bundle or model elsewhere."""

from __future__ import annotations

from edit_cli.console import print_result, working
from edit_cli.errors import bad_input
from edit_cli.export import write
from edit_cli.options import EXPORT
from edit_cli.request import Request, command


@command(EXPORT)
def export(request: Request) -> None:
    """Write routers or a model in a form that can be passed on, and check it by loading it again.

    [dim]edit export bundle -o my-routers
    edit export qwen-image-tiny --format static --budget 0.7 -o small[/dim]
    """
    write.check_export(request)
    with bad_input(), working(f"opening {request['source']}", "quiet" not in request) as say:
        written = write.export(request, say)
    print_result(written, write.as_table(written), request)
