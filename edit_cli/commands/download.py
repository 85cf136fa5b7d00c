"""`edit download`: fetch models from the hub."""

from __future__ import annotations

from backbones import registry
from backbones.local import local
from edit_cli.console import print_json, print_note, readable_bytes, stderr, stdout
from edit_cli.options import DOWNLOAD
from edit_cli.request import Request, command


@command(DOWNLOAD)
def download(request: Request) -> None:
    """Fetch models from the Hugging Face hub; what is here already is not fetched again.

    A broken connection is taken up again in the middle of a file; after a stop, finished files are kept.
    Gated models need `hf auth login` first.

    [dim]edit download z-image-turbo
    edit download owner/name[/dim]
    """
    from backbones.download import download

    rows = [registry.resolve(name) for name in request["models"]]
    done = []
    for row in rows:
        quiet = "quiet" in request
        if row.folder is None:
            if not quiet:
                print_note(f"fetching {row.source} into the hub's cache")
            folder = download(row, progress=not quiet and stderr().is_terminal)
        else:
            folder = row.folder
        found = local(row)
        done.append({"name": row.name, "folder": str(folder), "bytes": found.size, "state": found.state})
        if "json" not in request:
            how = "is part of the package" if found.state == "packaged" else readable_bytes(found.size)
            stdout().print(f"{row.name}  {how}  {folder}", soft_wrap=True, markup=False)
    if "json" in request:
        print_json({"models": done})
