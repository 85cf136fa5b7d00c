"""Progress of an unfinished calibration, kept so that an interrupted run can be resumed.

    request.json                what is being calibrated, and how; a resumed run must request the same
    record-0000.safetensors     what one dense batch gave (`record.Recorder.tensors`)
    gains.json                  one [[step, log gain], ...] per finished batch of probes
    trials.json                 one [levels of all steps, dB] per finished trial of a plan

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

from ..files import write_whole

REQUEST, GAINS, TRIALS = "request.json", "gains.json", "trials.json"
Probes = list[tuple[int, float]]
"""(step, log of its gain) of each probe in a batch."""


class State:
    """A folder with the progress. Writing raises OSError where the disk is full."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._gains: list[Probes] = []
        self._trials: list[tuple[list[int], float]] = []

    def begin(self, request: Mapping[str, Any], resume: bool) -> bool:
        """Start anew, or with resume go on where an earlier attempt stopped; True if there is one.

        request: JSON data. Raises ValueError, one line, if the attempt had another one or is damaged.
        """
        file = self.folder / REQUEST
        if resume and file.is_file():
            self._check(_read_json(file), json.loads(json.dumps(request)))
            gains, trials = self.folder / GAINS, self.folder / TRIALS
            self._gains = _read_json(gains) if gains.is_file() else []
            self._trials = _read_json(trials) if trials.is_file() else []
            return True
        self.discard()
        self.folder.mkdir(parents=True)
        self._write(REQUEST, json.dumps(request, indent=1))
        return False

    def discard(self) -> None:
        """Remove all of it."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def batch(self, number: int) -> dict[str, Tensor] | None:
        """What a dense batch gave, or None if it was not finished."""
        file = self.batch_file(number)
        if not file.is_file():
            return None
        try:
            return dict(load_file(file))
        except SafetensorError as error:
            raise _damaged(file) from error

    def keep_batch(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Remember a finished dense batch."""
        # cloned: rows may share memory
        apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_whole({self.batch_file(number): partial(save_file, apart)})

    def probes(self, number: int) -> Probes | None:
        """What a batch of probes gave, or None if it was not finished."""
        if number >= len(self._gains):
            return None
        return [(int(step), float(gain)) for step, gain in self._gains[number]]

    def keep_probes(self, probes: Probes) -> None:
        """Remember the next finished batch of probes."""
        self._gains.append(probes)
        self._write(GAINS, json.dumps(self._gains))

    def trial(self, levels: list[int]) -> float | None:
        """What a plan's trial gave, in dB, or None if it was not finished."""
        return next((float(score) for tried, score in self._trials if list(tried) == levels), None)

    def keep_trial(self, levels: list[int], score: float) -> None:
        """Remember a finished trial."""
        self._trials.append((levels, score))
        self._write(TRIALS, json.dumps(self._trials))

    def batch_file(self, number: int) -> Path:
        """Where a dense batch is kept."""
        return self.folder / f"record-{number:04d}.safetensors"

    def _write(self, name: str, text: str) -> None:
        write_whole({self.folder / name: lambda path: Path(path).write_text(text, encoding="utf-8")})

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
