"""Where results go: names, templates, and checks before any work. Torch-free.

Which of the names are free is settled when the run starts (`claims.py`).
"""

from __future__ import annotations

import itertools
import os
import string
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edit_cli.errors import EditError
from edit_cli.files import reason

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MESH_SUFFIXES = (".glb", ".obj", ".ply", ".stl")
FRAME = "frame"
TEMPLATE_FIELDS = ("prompt", "seed", "index", "budget", "model", FRAME)
"""What the name of a file may be made of; the last only where a result has frames."""
MAX_NAME = 60  # characters of a prompt that become part of a file name
MAX_BYTES = 240  # of a file name: file systems allow 255, and comparisons are named after results


def slug(prompt: str) -> str:
    """A prompt as a file name: "A cat, at night!" -> "a-cat-at-night"; letters of any script are kept."""
    # combining marks (category M) are part of letters in many scripts
    kept = (c.lower() if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in prompt)
    words = "".join(kept).split()
    return "-".join(words)[:MAX_NAME].rstrip("-") or "picture"


class Output(NamedTuple):
    """Where a result goes. free: a folder was named, or nothing: the name is ours, and may get a number."""

    path: Path
    free: bool

    def numbered(self, number: int) -> Path:
        """cat.png, cat-2.png, cat-3.png..."""
        path = self.path
        return path if number == 1 or not self.free else path.with_name(f"{path.stem}-{number}{path.suffix}")


def plan_outputs(
    output: str | None,
    fields: Sequence[Mapping[str, Any]],
    suffixes: Sequence[str] = PICTURE_SUFFIXES,
    option: str = "--output",
) -> list[Output]:
    """One place for each result, checked to be writable and distinct; folders are not made yet.

    output: a file, a folder, a template with {prompt} {seed} {index} {budget} {model}, or None for a
        name made from the prompt in the current folder. A result's own "output" field wins.
    fields: for each result the template's values, "output" optional.
    suffixes: allowed file suffixes, the first is the default. option: what messages call it.
    Raises EditError.
    """
    output = None if output is None else os.path.expanduser(output)
    outputs: list[Output] = []
    taken: set[Path] = set()
    several = Counter(f.get("output") or output for f in fields)
    by_prompt = Counter(slug(f["prompt"]) for f in fields)
    for field in fields:
        target = field.get("output") or output
        names = {**field, "prompt": slug(field["prompt"])}
        free = False
        if target is None or _is_folder(target):
            free = True
            alone = by_prompt[names["prompt"]] == 1
            name = names["prompt"] if alone else f"{names['prompt']}-{field['seed']}"
            ours = Output(Path(target or ".") / f"{name}{suffixes[0]}", free)
            path = next(path for n in itertools.count(1) if (path := ours.numbered(n)) not in taken)
        else:
            path = _fill(target, names, several[target] > 1, option)
        _check_suffix(path, suffixes, option)
        _check_length(path, option)
        if path in taken:
            raise EditError(
                f"{option} {target!r} would write two results to {str(path)!r}; add {{index}} or {{seed}}"
            )
        taken.add(path)
        outputs.append(Output(path, free))
    for folder in {path.parent for path in taken}:
        check_place(folder, option)
    for path, free in outputs:
        if path.is_dir() and not free:
            raise EditError(f"{option} {str(path)!r} is a folder; give a file name")
    return outputs


def _is_folder(target: str) -> bool:
    return target.endswith(("/", os.sep)) or os.path.isdir(target)


def _fill(target: str, names: Mapping[str, Any], several: bool, option: str) -> Path:
    try:
        used = {field for _, field, _, _ in string.Formatter().parse(target) if field is not None}
        allowed = [name for name in TEMPLATE_FIELDS if name in names or name != FRAME]
        unknown = used - set(allowed)
        if unknown:
            raise EditError(
                f"{option} field {{{sorted(unknown)[0]}}} is unknown; "
                f"allowed are {' '.join(f'{{{name}}}' for name in allowed)}"
            )
        path = Path(target.format(**{name: names.get(name, "") for name in used}) if used else target)
    except (ValueError, IndexError) as error:
        raise EditError(f"{option} {target!r} is not a valid template: {error}") from None
    if several and not used:
        return path.with_name(f"{path.stem}-{names['index']}{path.suffix}")
    return path


def _check_suffix(path: Path, suffixes: Sequence[str], option: str) -> None:
    if path.suffix.lower() not in suffixes:
        what = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise EditError(
            f"{option} {str(path)!r} has {what}; allowed are {', '.join(suffixes)} (a folder ends with /)"
        )


def _check_length(path: Path, option: str) -> None:
    length = len(os.fsencode(path.name))
    if length > MAX_BYTES:
        raise EditError(
            f"{option} name {path.name[:40] + '...'!r} has {length} bytes; "
            f"allowed are {MAX_BYTES}, shorten it"
        )


def check_place(folder: Path, option: str) -> None:
    """Raise EditError unless a folder exists, or can be made, and files in it; option: for the message."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        shown = folder if there == folder.absolute() else there
        raise EditError(f"{option} folder {str(shown)!r} is not a folder; choose another place")
    try:
        # the only certain test, also on read-only mounts and as root
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise EditError(
            f"{option} folder {str(folder)!r} is not writable: {reason(error)}; choose another place"
        ) from None
