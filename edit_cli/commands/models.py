"""`edit models`: what can be generated with. Torch-free."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.local import Local, local
from backbones.spec import COMMANDS, Backbone
from edit_cli.commands.help import bold
from edit_cli.console import print_json, readable_bytes, readable_count, stdout, two_columns
from edit_cli.errors import EditError, bad_input
from edit_cli.options import LISTING
from edit_cli.request import Request, command

SIZES, MORE = ("width", "height"), {"video": ("frames", "fps"), "sound": ("seconds",)}
"""Defaults that are listed of a model, by what it makes."""
STATES = {"packaged": "packaged", "here": "here", "partly": "in part", "hub": "download"}
"""Where a model is: in the package, in the hub's cache, a part of it there, or still to be downloaded."""

FOOT = """* used where --model is not given. GiB: all weights in bf16 (small models fp32).
size: px, or cells along a side of a mesh. `edit models NAME` tells more of one.
Any other diffusers pipeline with a transformer works too, by its folder or hub id."""


@command(LISTING)
def models(request: Request) -> None:
    """List the models known by name; any diffusers pipeline with a transformer works too.

    [dim]edit models --installed
    edit models qwen-image-tiny --words
    edit models --remove z-image
    edit models --inspect FOLDER[/dim]
    """
    if "inspect" in request:
        inspect(request)
        return
    if "remove" in request and "models" not in request:
        raise EditError("--remove needs the name of a model, like edit models NAME --remove")
    named = [registry.resolve(name) for name in request.get("models", ())]
    if "remove" in request:
        remove(named, "yes" in request)
        return
    if "words" in request:
        if not named:
            raise EditError("--words needs the name of a model, like edit models qwen-image-tiny --words")
        words(named, "json" in request)
        return
    rows = named or list(registry.rows().values())
    places = {row.name: local(row) for row in rows}
    if "installed" in request:
        rows = [row for row in rows if places[row.name].state in ("packaged", "here")]
    if "json" in request:
        print_json(
            {
                "default": registry.DEFAULT_MODELS["picture"],
                "default_3d": registry.DEFAULT_MODELS["mesh"],
                "models": [as_dict(row, places[row.name]) for row in rows],
            }
        )
    elif named:
        for row in rows:
            stdout().print(two_columns(details(row, places[row.name]), title=f"[bold]{row.name}[/]"))
    else:
        print(f"{listing(rows, places)}\n\n{FOOT}")


def words(rows: Sequence[Backbone], as_json: bool) -> None:
    """What can be asked of small models. Raises EditError for a model of which nobody can list it."""
    from backbones.vocabulary import vocabulary

    found = {}
    for row in rows:
        with bad_input():
            known = vocabulary(row.source)
        if known is None:
            raise EditError(f"--words: {row.name!r} was trained on too many words to be listed; try some")
        found[row.name] = {"things": known.things, "others": known.others, "sizes": known.sizes}
        if not as_json:
            things = [f"{name} ({', '.join(more)})" if more else name for name, more in known.things.items()]
            print(f"{row.name} draws:\n{', '.join(things)}\n\nwith: {', '.join(known.others)}")
    if as_json:
        print_json(found)


def remove(rows: Sequence[Backbone], sure: bool) -> None:
    """Take models out of the hub's cache. Raises EditError for what is not in it."""
    for row in rows:
        place = local(row)
        if place.state == "packaged" or row.folder is not None:
            why = "is part of the package" if row.packaged else "is a folder of yours"
            raise EditError(f"--remove {row.name!r} {why}; only what was downloaded is removed")
        from backbones.download import cached_revisions, remove

        if not cached_revisions(row):
            raise EditError(f"--remove {row.name!r}: nothing of it is in the local cache")
        others = [r.name for r in registry.rows().values() if r.name != row.name and _shares(r, row)]
        also = f", and with it {', '.join(others)} from the same repository" if others else ""
        question = f"remove {row.name} ({readable_bytes(place.size)}){also} from the local cache?"
        if not sure and not _agreed(question):
            print(f"{row.name} was kept")
            continue
        print(f"{row.name}: {readable_bytes(remove(row))} are free again")


def _shares(one: Backbone, other: Backbone) -> bool:
    return one.source.split("/")[:2] == other.source.split("/")[:2] and local(one).state == "here"


def _agreed(question: str) -> bool:
    """Asks on the terminal. Raises EditError where nobody can answer."""
    if not sys.stdin.isatty():
        raise EditError(f"{question} nobody can answer here; add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def details(row: Backbone, place: Local) -> dict[str, str]:
    """One model, line by line."""
    told = {
        "family": row.family.name,
        "makes": f"{COMMANDS[row.makes][0]}, by `{COMMANDS[row.makes][1]} -m {row.address}`",
        "summary": row.summary,
        "licence": row.licence,
        "parameters": _parameters(row),
        "memory": f"{row.memory_gib:g} GiB of weights" if row.parameters else "",
        "defaults": _defaults(row),
        "routers": "a bundle of its own, used where --budget is given" if row.bundle else "",
        "from": row.source,
        "here": f"{readable_bytes(place.size)} in {place.folder}" if place.state != "hub" else "",
        "next": f"edit download {row.name}" if place.state in ("hub", "partly") else "",
    }
    return {name: text for name, text in told.items() if text}


def _parameters(row: Backbone) -> str:
    transformer = f"{readable_count(row.transformer_parameters)} of the transformer"
    return f"{readable_count(row.parameters)}, {transformer}" if row.parameters else transformer


def _defaults(row: Backbone) -> str:
    known = {
        "size": _size(row),
        **{n: getattr(row.defaults, n) for n in ("steps", "guidance", "frames", "fps")},
    }
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None and value != "")


def _size(row: Backbone) -> str:
    """What a model makes where nothing is said: 1024x1024, or cells along a side."""
    if row.makes == "mesh":
        return f"{row.defaults.octree_resolution} cells"
    return f"{row.defaults.width}x{row.defaults.height}" if row.defaults.width else ""


def inspect(request: Request) -> None:
    """What can be controlled in a folder's transformers, from their configurations. Raises EditError."""
    with bad_input():
        from backbones.inspect import inspect_folder

        found = inspect_folder(Path(request["inspect"]).expanduser())
    if "json" in request:
        print_json({"transformers": [asdict(inspection) for inspection in found]})
        return
    from rich.padding import Padding
    from rich.text import Text

    for inspection in found:
        stdout().print(Text.assemble((inspection.component, "bold"), f"  {inspection.transformer}"))
        for row, count in zip(inspection.rows, inspection.counts, strict=True):
            stdout().print(Text(f"  {row.path}: {count} {row.block}"))
            told = {"streams": row.streams, "time": row.time, "MLPs": row.mlps}
            stdout().print(Padding(two_columns(told), (0, 0, 0, 4), expand=False))
        for path, reason in inspection.left_in_full.items():
            stdout().print(Text(f"  runs in full: {path} ({reason})", style="dim"))
        for note in inspection.notes:
            stdout().print(Text(f"  {note}", style="dim"))


def listing(rows: Sequence[Backbone], places: Mapping[str, Local]) -> str:
    """A line a model, without rich, whose import takes as long as all else; licences give way."""
    default = set(registry.DEFAULT_MODELS.values())
    lines = [("name", "makes", "params", "GiB", "size", "steps", "licence", "where")]
    lines += [
        (
            f"{row.name} *" if row.name in default else row.name,
            COMMANDS[row.makes][0],
            readable_count(row.parameters or row.transformer_parameters),
            f"{row.memory_gib:g}" if row.parameters else "",
            _size(row).removesuffix(" cells"),
            str(row.defaults.steps),
            row.licence,
            STATES[places[row.name].state],
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    licence = lines[0].index("licence")
    room = shutil.get_terminal_size((120, 24)).columns - sum(widths) - 2 * (len(widths) - 1)
    gap = "  " if room + widths[licence] >= 16 else " "
    room += 0 if gap == "  " else len(widths) - 1
    widths[licence] = max(min(widths[licence], widths[licence] + room), 8)
    text = "\n".join(gap.join(map(_cell, line, widths, RIGHT)).rstrip() for line in lines)
    first, rest = text.split("\n", 1)
    return f"{bold(first)}\n{rest}"


RIGHT = (False, False, True, True, True, True, False, False)
"""Which columns hold numbers."""


def _cell(text: str, width: int, right: bool) -> str:
    short = text if len(text) <= width else f"{text[: width - 1]}…"
    return short.rjust(width) if right else short.ljust(width)


def as_dict(row: Backbone, place: Local) -> dict[str, Any]:
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
        "state": place.state,
        "folder": None if place.folder is None else str(place.folder),
        "bytes": place.size,
        "routers": row.bundle is not None,
        **made,
        "steps": row.defaults.steps,
        "guidance": row.defaults.guidance,
        "summary": row.summary,
    }
