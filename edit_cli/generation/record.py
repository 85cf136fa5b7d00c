"""What a result remembers: everything needed to make it again, inside the file. Torch-free.

PNG: two text chunks, `parameters` for people and `edit` as JSON. JPEG and WebP: EXIF UserComment, where web
UIs look, and an XMP packet. GIF, MP4, WAV: the comment. GLB: `extras` of the asset (glTF 2.0).
"""

from __future__ import annotations

import html
import io
import json
import platform
import re
import struct
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli import __version__
from edit_cli.errors import EditError, is_out_of_memory
from edit_cli.files import reason
from edit_cli.generation.routers import routers_name

if TYPE_CHECKING:
    from PIL import Image

    from backbones.spec import Placement
    from edit_cli.generation.medium import Job
    from edit_cli.generation.plan import Plan
    from edit_cli.generation.session import Batch, Session

MUST_MATCH = (
    "model_hash", "routers_hash", "lora_hashes", "image_hash", "image_hashes", "mask_hash",
    "control_image_hash", "device", "card", "dtype", "compile", "quantize", "vae_tiling",
    "versions",
)  # fmt: skip
"""Record entries that decide whether a replayed result can be identical."""

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
UNICODE_COMMENT = b"UNICODE\x00"  # EXIF 2.3: character code of a UserComment; UTF-16 follows
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:edit="urn:edit:1" edit:request="{}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
QUALITY = 95
MAX_COMMENT = 60_000  # bytes; a segment of a JPEG holds 64 KiB
COMMENTS = {".mp4": (b"\xa9cmt", 16), ".wav": (b"ICMT", 4)}
"""Where files of sound and video have their comment: behind this marker and so many bytes of sizes."""
GLB_MAGIC, JSON_CHUNK = b"glTF", b"JSON"


def make_record(batch: Batch, row: int, session: Session) -> dict[str, Any]:
    """Everything needed to make one result of a batch again, as JSON data."""
    import torch

    from backbones import loading

    job, plan = batch.jobs[row], session.plan
    medium, backbone = plan.medium, plan.backbone
    record: dict[str, Any] = {
        **{name: getattr(job, name) for name in medium.recorded_fields},
        "budget": job.budget,
        "target": job.target,
        **({"turns": job.turns} if job.turns else {}),
        **({} if job.time is None else {"asked_time": job.time}),
        "spent": round(batch.trace.spent[row], 4),
        "model": backbone.name,
        "model_source": backbone.address,
        "model_base": backbone.file.base if backbone.file else None,
        "model_hash": loading.model_hash(backbone),
        "routers": routers_name(plan.routers, backbone),
        "routers_hash": session.source.digest,
        "force": plan.force,
        "loras": _loras(plan.placement),
        "lora_hashes": [loading.fingerprint(lora.path) for lora in plan.placement.loras],
        **medium.record(job, session),
        "device": session.device,
        "card": loading.card(session.device),
        "dtype": loading.dtype_name(session.pipe.dtype),
        "compile": plan.placement.compile,
        "quantize": plan.placement.quantize,
        "vae_tiling": plan.placement.vae_tiling,
        "threads": torch.get_num_threads(),
        "versions": _versions(medium.libraries),
    }
    if len(batch.jobs) > 1:
        record["batch"] = [
            {name: getattr(peer, name) for name in (*medium.recorded_rows, "budget")} for peer in batch.jobs
        ]
        record["row"] = row
    return record


def same_request(record: Mapping[str, Any], plan: Plan, job: Job) -> bool:
    """Whether a record's result was asked for as a settled job is."""
    medium, placement = plan.medium, plan.placement
    asked = {
        **{name: getattr(job, name) for name in medium.recorded_fields},
        **{name: getattr(job, name) for name in ("target", "solver")},
        **({"budget": job.budget} if job.time is None else {"asked_time": job.time}),
        **medium.inputs(job),
        "model": plan.backbone.name,
        "model_source": plan.backbone.address,
        "routers": routers_name(plan.routers, plan.backbone),
        "loras": _loras(placement),
        "compile": placement.compile,
        **({} if placement.dtype == "auto" else {"dtype": placement.dtype}),
    }
    return all(record.get(name) == value for name, value in json.loads(json.dumps(asked)).items())


def _loras(placement: Placement) -> list[str]:
    return [f"{lora.path}:{lora.scale:g}" for lora in placement.loras]


def differences(record: Mapping[str, Any], plan: Plan) -> list[str]:
    """A note where a replayed result can differ from the original, which was made with something else."""
    old = plan.replayed
    if old is None:
        return []
    changed = [name for name in MUST_MATCH if name in old and old[name] != record.get(name)]
    if not changed:
        return []
    what = plan.medium.makes
    return [f"not what the original was made with: {', '.join(changed)}; the {what} may differ"]


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    versions = {"edit": __version__, "python": platform.python_version()}
    for name in libraries:
        try:
            versions[name] = package_version(name)
        except PackageNotFoundError:  # noqa: PERF203 - a few packages
            continue
    return versions


def parameters_text(record: Mapping[str, Any]) -> str:
    """The usual web-UI form: prompt, negative prompt, then one line of settings."""
    settings = {
        "Steps": record["steps"],
        "Sampler": record.get("sampler", "Euler"),
        "CFG scale": record["guidance"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}" if record.get("width") else None,
        "Model hash": record.get("model_hash"),
        "Model": record["model"],
        "Denoising strength": record.get("strength"),
        "Budget": record.get("budget"),
        "Spent": record.get("spent"),
        "Version": f"edit {record['versions']['edit']}",
    }
    lines = [record["prompt"]]
    if (record.get("negative_prompt") or "").strip():
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def encode_picture(picture: Image.Image, suffix: str, record: Mapping[str, Any], **more: Any) -> bytes:
    """The picture as a file's bytes, with its record inside. suffix: of a PNG, JPEG or WebP.

    An empty record is left out. more: further arguments of Pillow's `save`, not for PNG.
    """
    from PIL import Image, PngImagePlugin

    data, buffer = json.dumps(record, ensure_ascii=False), io.BytesIO()
    if suffix.lower() == ".png":
        chunks = PngImagePlugin.PngInfo()
        if record:  # plain tEXt chunks are Latin-1, iTXt carries any script
            chunks.add_itxt("parameters", parameters_text(record))
            chunks.add_itxt("edit", data)
        picture.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    options: dict[str, Any] = {"quality": QUALITY, **more}
    if record:
        exif = Image.Exif()
        comment = parameters_text(record).encode("utf-16-be")[:MAX_COMMENT]
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE_COMMENT + comment
        options["exif"], options["xmp"] = exif.tobytes(), XMP.format(html.escape(data, quote=True)).encode()
    kind = "WEBP" if suffix.lower() == ".webp" else "JPEG"
    picture.convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of a file made by `edit generate`. Raises EditError if there is none."""
    place = COMMENTS.get(Path(path).suffix.lower())
    return read_picture(path) if place is None else _read_comment(Path(path).expanduser(), *place)


def _read_comment(path: Path, marker: bytes, skip: int) -> dict[str, Any]:
    """JSON behind a marker, up to its closing NUL or the end of its bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EditError(
            f"--from {str(path)!r} cannot be read: {reason(error)}; give a file made by `edit generate`"
        ) from None
    text = (
        data[data.rfind(marker) + len(marker) + skip :].decode("utf-8", "replace") if marker in data else ""
    )
    try:
        text = text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        text = ""
    return _checked(text, "PictureRecord", path, "has no `edit` metadata; it was not made by `edit generate`")


def _checked(
    data: Any, kind: str, path: object, none: str, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    from edit_cli.generation import recorded  # what schemas are made of, which commands do without

    return recorded.checked(data, getattr(recorded, kind), path, none, size)


def read_picture(path: str | Path) -> dict[str, Any]:
    """The record of a picture made by `edit`. Raises EditError if there is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            info, size = dict(picture.info), picture.size
    except FileNotFoundError:
        raise EditError(
            f"--from {str(path)!r} does not exist; give a picture made by `edit generate`"
        ) from None
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        if is_out_of_memory(error):
            raise
        raise EditError(
            f"--from {str(path)!r} is not a readable picture; give one made by `edit generate`"
        ) from None
    text, xmp = info.get("edit") or info.get("comment"), info.get("xmp")
    if text is None and xmp is not None:
        packet = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
        stored = re.search(r'edit:request="([^"]*)"', packet)
        text = html.unescape(stored[1]) if stored else None
    none = "has no `edit` metadata; it was not made by `edit`, or was re-saved"
    return _checked(text, "PictureRecord", path, none, size)


def encode_mesh(mesh: Any, suffix: str, record: Mapping[str, Any]) -> bytes:
    """A trimesh as a file's bytes. Only a GLB has a place for the record."""
    suffix = suffix.lower()
    if suffix == ".glb":
        from trimesh.exchange.gltf import export_glb

        from edit_cli.generation.colours import add_matte, linear

        def add_record(tree: dict[str, Any]) -> None:
            tree["asset"]["extras"] = {"edit": dict(record)}
            add_matte(tree)

        mesh = linear(mesh) if mesh.visual.kind == "vertex" else mesh
        return bytes(export_glb(mesh.scene(), include_normals=True, tree_postprocessor=add_record))
    data = mesh.export(file_type=suffix[1:])
    return data.encode() if isinstance(data, str) else bytes(data)


def read_mesh(path: str | Path) -> dict[str, Any]:
    """The record of a GLB made by `edit`, from its JSON chunk. Raises EditError if there is none."""
    import routers.schema as schema

    try:
        with Path(path).expanduser().open("rb") as file:
            magic, _, _, length, kind = struct.unpack("<4sIII4s", file.read(20))
            text = file.read(length) if (magic, kind) == (GLB_MAGIC, JSON_CHUNK) else b""
        tree = schema.decode(text, dict[str, Any], "")
    except FileNotFoundError:
        raise EditError(
            f"--from {str(path)!r} does not exist; give a .glb made by `edit generate-3d`"
        ) from None
    except (OSError, ValueError, struct.error, MemoryError):
        raise EditError(
            f"--from {str(path)!r} is not a readable GLB; give one made by `edit generate-3d`"
        ) from None
    found: Any = tree
    for name in ("asset", "extras", "edit"):
        found = found.get(name) if isinstance(found, dict) else None
    none = "has no `edit` metadata; it was not made by `edit generate-3d`"
    return _checked(found, "MeshRecord", path, none)
