"""What a comparison has measured so far, in a folder that a killed run leaves usable.

    run.json          what was asked: a folder continues only the same comparison
    points.jsonl      one line per rival and setting: FLOPs ratio and the scores of every prompt
    chosen.json       what rivals chose for themselves on other prompts, such as a shift
    times.jsonl       one line per rival, setting, batch size and round: its seconds and those of dense

Dense and exact pictures (or latents of meshes) are kept in `CACHE`, since other comparisons share them.

Shapes: P prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.files import write_whole

CACHE = Path(".cache/pareto")
"""Of references, in the present folder; git ignores it."""
REFERENCED = (
    "fingerprint", "prompts", "seed", "steps", "guidance", "width", "height", "reference_steps", "torch",
    "machine",
)  # fmt: skip
"""What references depend on."""


@dataclass
class Point:
    """One rival at one setting. flops: ratio to dense. scores: name -> a value per prompt [P]. whole: name ->
    a value of all prompts together.

    times: batch size -> time ratios to dense, one per round. bundle: digest of the bundle it ran with, None
    where none is used.
    """

    rival: str
    setting: dict[str, Any]
    flops: float
    scores: dict[str, list[float]]
    times: dict[int, list[float]] = field(default_factory=dict)
    bundle: str | None = None
    whole: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique in a comparison."""
        return point_key(self.rival, self.setting)


def point_key(rival: str, setting: Mapping[str, Any]) -> str:
    """A name such as "FirstBlockCache threshold=0.1"."""
    return " ".join([rival, *(f"{name}={value}" for name, value in setting.items())])


class Store:
    """A results folder. Raises ValueError if it holds another comparison or cannot be written.

    bundle: digest of the bundle at hand; what was measured with another one counts as not measured.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], bundle: str | None = None) -> None:
        self.folder, self.points, self.bundle = folder, folder / "points.jsonl", bundle
        self.times, self.chosen_file = folder / "times.jsonl", folder / "chosen.json"
        known = json.dumps({name: value for name, value in asked.items() if name in REFERENCED})
        self.references = CACHE / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.npz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"results folder {str(folder)!r} cannot be made: {error.strerror}") from error
        description, asked = folder / "run.json", json.loads(json.dumps(dict(asked)))
        if not description.is_file():
            write_text(description, json.dumps(asked, indent=1) + "\n")
            return
        known = json.loads(description.read_text())
        changed = [name for name in sorted({*known, *asked}) if known.get(name) != asked.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{folder} holds another comparison: other {', '.join(changed)} "
                f"({name} {_brief(known.get(name))}, now {_brief(asked.get(name))}); "
                "give another folder with -o"
            )

    def add_point(self, point: Point) -> None:
        """Keep a measured point."""
        row = asdict(point)
        row.pop("times")
        _append(self.points, row)

    def load_chosen(self) -> dict[str, float]:
        """What rivals chose."""
        return json.loads(self.chosen_file.read_text()) if self.chosen_file.is_file() else {}

    def save_chosen(self, chosen: Mapping[str, float]) -> None:
        """Keep what rivals chose."""
        write_text(self.chosen_file, json.dumps(dict(chosen), indent=1) + "\n")

    def add_time(
        self, key: str, rows: int, turn: int, seconds: float, dense: float, bundle: str | None = None
    ) -> None:
        """Keep a measured time. rows: batch size; turn: round; seconds, dense: s; bundle: see `Point`."""
        line = {"key": key, "rows": rows, "round": turn, "seconds": seconds, "dense": dense, "bundle": bundle}
        _append(self.times, line)

    def forget(self, rivals: Iterable[str]) -> None:
        """Drop what was measured of these rivals, so that it is measured anew."""
        gone = set(rivals)
        keys = {point.key for point in self.load().values() if point.rival in gone}
        for file, lost in (
            (self.points, lambda line: line["rival"] in gone),
            (self.times, lambda line: line["key"] in keys),
        ):
            kept = "".join(json.dumps(line) + "\n" for line in _lines(file) if not lost(line))
            if file.is_file():
                write_text(file, kept)

    def timed(self) -> set[tuple[str, int, int]]:
        """(key, rows, round) of all times kept."""
        return {(line["key"], line["rows"], line["round"]) for line in self._current(self.times)}

    def _current(self, file: Path) -> Iterator[dict[str, Any]]:
        """Lines of a file that were not measured with another bundle."""
        return (line for line in _lines(file) if line.get("bundle") in (None, self.bundle))

    def load(self) -> dict[str, Point]:
        """All points kept, with their times."""
        found = {point.key: point for point in (Point(**line) for line in self._current(self.points))}
        for line in self._current(self.times):
            if line["key"] in found:
                found[line["key"]].times.setdefault(line["rows"], []).append(line["seconds"] / line["dense"])
        return found

    def save_references(self, arrays: Mapping[str, NDArray[Any]], dense_flops: float) -> None:
        """Keep the references, packed. dense_flops: of all prompts."""

        def write(path: str) -> None:
            with open(path, "wb") as file:
                np.savez_compressed(file, dense_flops=np.array(dense_flops), **dict(arrays))

        self.references.parent.mkdir(parents=True, exist_ok=True)
        write_whole({self.references: write})

    def load_references(self) -> tuple[dict[str, NDArray[Any]], float] | None:
        """What `save_references` kept, or None."""
        if not self.references.is_file():
            return None
        with np.load(self.references, allow_pickle=False) as file:
            flops = float(file["dense_flops"])
            return {name: file[name] for name in file.files if name != "dense_flops"}, flops


def write_text(target: Path, text: str) -> None:
    """A text file, which appears whole or not at all."""
    write_whole({target: lambda path: Path(path).write_text(text, encoding="utf-8")})


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; a last one that a kill cut short is dropped, also from the file."""
    if not file.is_file():
        return
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_text(file, whole.decode("utf-8"))
    for line in whole.decode("utf-8").splitlines():
        yield json.loads(line)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
