"""Progress of an unfinished calibration, kept so that an interrupted run can be resumed.

    request.json          what is being calibrated, and how; a resumed run must request the same
    NAME.safetensors      what a finished part gave: a recorded run, a plan, a batch of a training

Each file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import schema
from ..files import TEMPORARY, write_whole

REQUEST = "request.json"
ANEW = "leave out --resume and give --overwrite to start anew"


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
            try:
                before = schema.decode(file.read_bytes(), dict[schema.Name, Any], str(file))
            except ValueError as error:
                raise ValueError(f"{error}; {ANEW}") from None
            self._check(before, json.loads(json.dumps(request)))
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
            with safe_open(file, framework="pt") as kept:
                # cloned: the file may go away before the tensors do
                tensors = {key: kept.get_tensor(key).clone() for key in kept.keys()}  # noqa: SIM118 - no mapping
                same = (kept.metadata() or {}).get("sha256") == digest(tensors)
        except SafetensorError:
            same = False
        if not same:
            raise ValueError(f"{str(file)!r} is damaged; {ANEW}")
        return tensors

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember a finished part."""
        # cloned: rows may share memory
        apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        metadata = {"sha256": digest(apart)}
        write_whole({self.file(name): lambda path: save_file(apart, path, metadata=metadata)})

    def file(self, name: str) -> Path:
        """Where a part is kept."""
        return self.folder / f"{name}.safetensors"

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in {**now, **before}:
            old, new = before.get(name), now.get(name)
            if old != new:
                short = all(isinstance(v, (str, int, float, type(None))) for v in (old, new))
                change = f": it was {old!r}, now it is {new!r}" if short else ""
                raise ValueError(
                    f"the unfinished calibration in {str(self.folder)!r} has another {name}{change}; "
                    f"ask for the same, or {ANEW}"
                )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
