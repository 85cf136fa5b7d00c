"""Progress of an unfinished calibration, kept so that an interrupted run can be resumed.

    request.json          what is being calibrated, and how; a resumed run must request the same
    NAME.safetensors      what a finished part gave: a recorded run, a plan, a batch of a training

Each file appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import TEMPORARY, write_whole

REQUEST = "request.json"


class State:
    """A folder with the progress. Writing raises OSError where the disk is full."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def begin(self, request: Mapping[str, Any], resume: bool) -> bool:
        """Start anew, or with resume go on where an earlier attempt stopped; True if there is one.

        request: JSON data. Raises ValueError, one line, if the attempt had another one or is damaged.
        """
        file = self.folder / REQUEST
        if resume and file.is_file():
            self._check(_read_json(file), json.loads(json.dumps(request)))
            for unfinished in self.folder.glob(f".*{TEMPORARY}"):
                unfinished.unlink()
            return True
        self.discard()
        self.folder.mkdir(parents=True)
        text = json.dumps(request, indent=1)
        write_whole({file: lambda path: Path(path).write_text(text, encoding="utf-8")})
        return False

    def discard(self) -> None:
        """Remove all of it."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What a part gave, or None if it was not finished. Raises ValueError if its file is damaged."""
        file = self.file(name)
        if not file.is_file():
            return None
        try:
            return dict(load_file(file))
        except SafetensorError as error:
            raise _damaged(file) from error

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember a finished part."""
        # cloned: rows may share memory
        apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        write_whole({self.file(name): partial(save_file, apart)})

    def file(self, name: str) -> Path:
        """Where a part is kept."""
        return self.folder / f"{name}.safetensors"

    def _check(self, before: Any, now: Mapping[str, Any]) -> None:
        if not isinstance(before, dict):
            raise _damaged(self.folder / REQUEST)
        for name in {**now, **before}:
            old, new = before.get(name), now.get(name)
            if old != new:
                short = all(isinstance(v, (str, int, float, type(None))) for v in (old, new))
                change = f": it was {old!r}, now it is {new!r}" if short else ""
                raise ValueError(
                    f"the unfinished calibration in {str(self.folder)!r} has another {name}{change}; "
                    "ask for the same, or leave out --resume to start anew"
                )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> ValueError:
    return ValueError(f"{str(file)!r} is damaged; leave out --resume to start anew")
