"""The medium SOUND: prompts to WAV files. Torch-free until a pipeline is called."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from backbones import registry
from backbones.spec import Backbone, Makes
from edit_cli.errors import RunError
from edit_cli.generation.medium import Fields
from edit_cli.generation.picture import Picture, PictureJob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")
"""What components call the samples per second they decode to."""
THUMBNAIL = (224, 64)
"""Size of a sound's picture in a report, px."""


@dataclass(frozen=True, kw_only=True)
class SoundJob(PictureJob):
    """One sound to make. seconds None: as long as the pipeline makes them."""

    seconds: float | None


@dataclass
class Waves:
    """A sound: values in [-1, 1] [C, T], float32, and samples per second."""

    values: NDArray[np.float32]
    rate: int


class Sound(Picture):
    """Sounds of prompts."""

    makes: Makes = "sound"
    things = "sounds"
    job = SoundJob
    suffixes = (".wav",)
    recorded_fields = ("prompt", "negative_prompt", "seed", "steps", "guidance", "seconds")

    def complete(self, fields: Fields, backbone: Backbone, warnings: list[str]) -> Fields:
        """As of a picture; the length."""
        made = super().complete(fields, backbone, warnings)
        seconds = fields.get("seconds") or backbone.defaults.seconds
        return {**made, "seconds": None if seconds is None else float(seconds)}

    def latent(self, _job: Any, backbone: Backbone) -> int:
        """Of the longest sound."""
        config = registry.component_configs(backbone)["transformer"]
        return int((config.get("in_channels") or 0) * (config.get("sample_size") or 0))

    def size(self, jobs: Sequence[Any]) -> str:
        """The length."""
        lengths = {f"{job.seconds:g} s" if job.seconds else "its own length" for job in jobs}
        return lengths.pop() if len(lengths) == 1 else "several lengths"

    def results(self, pipe: Any, output: Any, gives: str, _jobs: int) -> list[Any]:
        """One for each job."""
        return waves(pipe, getattr(output, gives))

    def encode(self, job: Any, made: Waves, record: Mapping[str, Any]) -> dict[Path, bytes]:
        """A WAV file."""
        return {job.path: encode_wav(made, record)}

    def safest(self, _path: Path) -> str:
        """There is but one."""
        return ".wav"

    def facts(self, made: Waves) -> dict[str, Any]:
        """What came out."""
        channels, length = made.values.shape
        return {"duration": round(length / made.rate, 3), "channels": channels, "rate": made.rate}

    def thumbnail(self, made: Waves) -> Image.Image:
        """How loud it is over time."""
        import numpy as np
        from PIL import Image, ImageDraw

        width, height = THUMBNAIL
        picture = Image.new("RGB", THUMBNAIL, "white")
        draw = ImageDraw.Draw(picture)
        for x, part in enumerate(np.array_split(np.abs(made.values).max(0), width)):
            reach = float(part.max(initial=0.0)) * height / 2
            draw.line([(x, height / 2 - reach), (x, height / 2 + reach)], "black")
        return picture

    def comparison_path(self, path: Path, compare: str) -> Path:
        """The dense or exact sound."""
        return path.with_name(f"{path.stem}-{compare}{path.suffix}")

    def compare(self, made: Waves, dense: Waves) -> dict[str, float]:
        """Signal to difference in dB, at most 99."""
        import numpy as np

        error = float(np.square(made.values - dense.values).mean())
        signal = float(np.square(dense.values).mean())
        ratio = 99.0 if error == 0 else 10 * float(np.log10(max(signal, 1e-20) / error))
        return {"snr": round(min(ratio, 99.0), 2)}

    def encode_comparison(self, made: Mapping[str, Waves], suffix: str) -> bytes:
        """The exact sound if there is one, else the dense one; as WAV."""
        return encode_wav(made.get("exact", made["dense"]), {})

    def comparison_line(self, comparison: Mapping[str, Any]) -> str:
        """Seconds and the signal-to-difference ratio."""
        return (
            f"denoising took {comparison['dense_seconds']:.2f} s dense, "
            f"{comparison['elastic_seconds']:.2f} s elastic: measured time ratio "
            f"{comparison['time_ratio']:.2f}; difference {fmean(comparison['snr']):.1f} dB below the signal"
        )


SOUND = Sound()


def sampling_rate(pipe: Any) -> int:
    """Samples per second of what a pipeline gives. Raises RunError if no component says so."""
    parts = [getattr(pipe, name, None) for name in ("vocoder", "audio_vae", "vae")]
    for owner in (*(getattr(part, "config", None) for part in parts), *parts, pipe):
        for name in RATES:
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise RunError(f"{type(pipe).__name__} does not say how many samples a second has")


def waves(pipe: Any, made: Any) -> list[Waves | RunError]:
    """Sounds of what a pipeline gives: [C, T] or [T] each. Raises RunError if their rate is not known."""
    import numpy as np

    rate = sampling_rate(pipe)
    arrays = [np.asarray(one.float().cpu() if hasattr(one, "cpu") else one, np.float32) for one in made]
    return [
        Waves(array.reshape(-1, array.shape[-1]), rate)
        if np.isfinite(array).all()
        else RunError("the numbers overflowed; try --dtype bf16 or fp32")
        for array in arrays
    ]


def encode_wav(made: Waves, record: Mapping[str, Any]) -> bytes:
    """16-bit PCM, with the record as the comment of its INFO list (RIFF, chunk ICMT)."""

    import wave

    buffer = io.BytesIO()
    channels, _ = made.values.shape
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(made.rate)
        file.writeframes((made.values.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    if not record:
        return buffer.getvalue()
    text = json.dumps(record).encode() + b"\0"
    text += b"\0" * (len(text) % 2)
    info = b"INFO" + b"ICMT" + struct.pack("<I", len(text)) + text
    body = buffer.getvalue()[8:] + b"LIST" + struct.pack("<I", len(info)) + info
    return b"RIFF" + struct.pack("<I", len(body)) + body
