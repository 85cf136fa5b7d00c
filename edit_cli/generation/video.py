"""The medium VIDEO: prompts to videos, a file or one picture a frame. Torch-free until the call.

A model's sound goes into the MP4; the other formats have none, and get a WAV file beside them.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from backbones.spec import Backbone, CallSize, Makes
from edit_cli.errors import EditError
from edit_cli.generation.medium import Fields
from edit_cli.generation.outputs import PICTURE_SUFFIXES
from edit_cli.generation.picture import Picture, PictureJob
from edit_cli.generation.record import encode_picture
from edit_cli.generation.sound import Waves, encode_wav, waves

if TYPE_CHECKING:
    from PIL import Image

FPS = 16.0
"""Where neither the request nor the model says how fast a video is played."""
FRAME = "{frame}"
"""What stands for a frame's number in the name of its picture."""
STILLS = (".png", ".jpg", ".jpeg")
QUALITY = {"crf": "16"}
"""Of H.264: hardly any loss that shows."""

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Samples per second that AAC has; other sounds become the last."""

Frames = list["Image.Image"]


@dataclass(frozen=True, kw_only=True)
class VideoJob(PictureJob):
    """One video to make. frames None: as many as the pipeline makes. fps: frames per second."""

    frames: int | None
    fps: float


@dataclass
class Clip:
    """A video. sound: of models that make one with it."""

    frames: Frames
    sound: Waves | None = None


class Video(Picture):
    """Videos of prompts."""

    makes: Makes = "video"
    things = "videos"
    job = VideoJob
    suffixes = (".mp4", ".gif", *PICTURE_SUFFIXES)
    if importlib.util.find_spec("av") is None:
        suffixes = (".gif", ".mp4", *PICTURE_SUFFIXES)
    placeholders: Mapping[str, str] = {"frame": FRAME}
    recorded_fields = (*Picture.recorded_fields, "frames", "fps")

    def complete(self, fields: Fields, backbone: Backbone, warnings: list[str]) -> Fields:
        """As of a picture; frames and their rate."""
        base = backbone.defaults
        made = super().complete(fields, backbone, warnings)
        fps = float(fields.get("fps") or base.fps or FPS)
        return {
            **made,
            "frames": fields.get("frames") or base.frames,
            "fps": int(fps) if fps == int(fps) else fps,
        }

    def check_path(self, path: Path) -> None:
        """Raise EditError for a file that cannot be written here."""
        if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
            raise EditError(
                f"--output {str(path)!r} needs PyAV; pip install 'elastic-dit[video]', or give a .gif"
            )
        if path.suffix.lower() in STILLS and FRAME not in path.name:
            raise EditError(
                f"--output {str(path)!r} is one picture of many; write {FRAME} where the frame's number "
                f"goes, like {str(path.with_name(FRAME + path.suffix))!r}"
            )

    def calls(self, job: Any, backbone: Backbone) -> list[CallSize]:
        """As of a picture of so many frames."""
        return [replace(size, frames=job.frames or 1) for size in super().calls(job, backbone)]

    def latent(self, job: Any, backbone: Backbone) -> int:
        """As of so many pictures; most models take several frames together."""
        return super().latent(job, backbone) * (job.frames or 1)

    def size(self, jobs: Sequence[Any]) -> str:
        """Width, height and frames."""
        frames = {f"{job.frames} frames" if job.frames else "its own length" for job in jobs}
        return f"{super().size(jobs)}, {frames.pop() if len(frames) == 1 else 'several lengths'}"

    def results(self, pipe: Any, output: Any, gives: str, jobs: int) -> list[Any]:
        """A clip for each job."""
        made, sound = getattr(output, gives), getattr(output, "audio", None)
        clips: list[Any] = [Clip(_frames(video)) for video in (made if len(made) == jobs else [made])]
        for i, heard in enumerate([] if sound is None else waves(pipe, sound)):
            clips[i] = replace(clips[i], sound=heard) if isinstance(heard, Waves) else heard
        return clips

    def encode(self, job: Any, made: Clip, record: Mapping[str, Any]) -> dict[Path, bytes]:
        """One file, or one for every frame; with a sound that they cannot hold beside them."""
        path, files = job.path, dict[Path, bytes]()
        if FRAME not in path.name:
            files[path] = encode_video(made, path.suffix, record, job.fps)
        else:
            for i, frame in enumerate(made.frames, 1):
                name = path.name.replace(FRAME, f"{i:04d}")
                files[path.with_name(name)] = encode_picture(frame, path.suffix, record)
        if made.sound is not None and path.suffix.lower() != ".mp4":
            files[_named(path, ".wav")] = encode_wav(made.sound, record)
        return files

    def safest(self, path: Path) -> str:
        """A GIF, or a PNG of every frame."""
        return ".png" if FRAME in path.name else ".gif"

    def facts(self, made: Clip) -> dict[str, Any]:
        """What came out."""
        return {"frames": len(made.frames), "size": list(made.frames[0].size)}

    def thumbnail(self, made: Clip) -> Image.Image:
        """The first frame."""
        return made.frames[0]

    def comparison_path(self, path: Path, _compare: str) -> Path:
        """The side-by-side video."""
        return _named(path, ".gif" if FRAME in path.name else path.suffix, "-compare")

    def compare(self, made: Clip, dense: Clip) -> dict[str, float]:
        """Means over the frames."""
        each = [super(Video, self).compare(a, b) for a, b in zip(made.frames, dense.frames, strict=True)]
        return {name: round(fmean(values[name] for values in each), 4) for name in each[0]}

    def encode_comparison(self, made: Mapping[str, Clip], suffix: str) -> bytes:
        """The videos side by side with their names, without sound."""
        from edit_cli.generation.closeness import side_by_side

        frames = zip(*(clip.frames for clip in made.values()), strict=True)
        rows = [dict(zip(made, row, strict=True)) for row in frames]
        return encode_video(Clip([side_by_side(row) for row in rows]), suffix, {}, FPS)


VIDEO = Video()


def _named(path: Path, suffix: str, end: str = "") -> Path:
    """A file beside a video, or beside its frames."""
    return path.with_name(f"{path.stem.replace(FRAME, 'frames')}{end}{suffix}")


def _frames(video: Any) -> Frames:
    """Pictures of what pipelines give: pictures, or values in [0, 1] [F, H, W, C] (NumPy), [F, C, H, W]."""
    import numpy as np
    from PIL import Image

    if isinstance(video, list) and isinstance(video[0], Image.Image):
        return video
    if hasattr(video, "cpu"):
        video = video.float().cpu().permute(0, 2, 3, 1).numpy()
    values = np.nan_to_num(np.asarray(video))
    return [Image.fromarray((frame.clip(0, 1) * 255).round().astype(np.uint8)) for frame in values]


def encode_video(made: Clip, suffix: str, record: Mapping[str, Any], fps: float) -> bytes:
    """A video as a file's bytes, with its record inside. suffix: .mp4, .gif or .webp."""
    if suffix.lower() == ".mp4":
        return _mp4(made, record, fps)
    frames = made.frames
    moving = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    if suffix.lower() == ".webp":
        return encode_picture(frames[0], suffix, record, **moving)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", comment=json.dumps(record).encode(), **moving)
    return buffer.getvalue()


def _mp4(made: Clip, record: Mapping[str, Any], fps: float) -> bytes:
    """H.264 and AAC, the record as the file's comment. Sides are cut to even numbers."""
    from fractions import Fraction

    import av

    buffer = io.BytesIO()
    width, height = (side - side % 2 for side in made.frames[0].size)
    with av.open(buffer, "w", format="mp4") as file:
        file.metadata["comment"] = json.dumps(record)
        stream: Any = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        heard = None if made.sound is None else _track(file, made.sound)
        for frame in made.frames:
            file.mux(
                stream.encode(av.VideoFrame.from_image(frame.convert("RGB").crop((0, 0, width, height))))
            )
        file.mux(stream.encode())
        if heard is not None:
            file.mux([*heard[0].encode(heard[1]), *heard[0].encode()])
    return buffer.getvalue()


def _track(file: Any, sound: Waves) -> tuple[Any, Any]:
    """An AAC stream of a file that is being written, and what to encode in it: at most two channels."""
    import av
    import numpy as np

    values = np.ascontiguousarray(sound.values[:2].clip(-1, 1))
    layout = "stereo" if len(values) == 2 else "mono"
    stream = file.add_stream(
        "aac", rate=sound.rate if sound.rate in AAC_RATES else AAC_RATES[-1], layout=layout
    )
    frame = av.AudioFrame.from_ndarray(values, format="fltp", layout=layout)
    frame.sample_rate = sound.rate
    return stream, frame
