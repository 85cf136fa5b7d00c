"""The medium MESH: pictures to meshes by an image-to-mesh pipeline. Torch-free until a pipeline is called."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from backbones import registry
from backbones.spec import GIB, Backbone, CallSize, Makes
from edit_cli import options
from edit_cli.errors import EditError, RunError, bad_input, memory_errors
from edit_cli.generation.medium import Fields, Job, OnStep
from edit_cli.generation.outputs import MESH_SUFFIXES
from edit_cli.generation.record import encode_mesh, encode_picture, read_mesh
from edit_cli.request import in_lines

if TYPE_CHECKING:
    from PIL import Image

    from backbones.workloads import MeshWorkload
    from edit_cli.generation.session import Session

DENSE_BYTES, SPARSE_BYTES = 24, 16
"""Peak bytes a grid point costs: node numbers, values and the copies marching cubes makes."""
THUMBNAIL = 224
"""Side of a mesh's view in a report, px."""


@dataclass(frozen=True, kw_only=True)
class MeshJob(Job):
    """One mesh to make. images: one picture, or one per name in `views`. faces None: as many as there are."""

    images: tuple[str, ...]
    views: tuple[str, ...]
    octree_resolution: int
    decode: str
    faces: int | None
    remove_background: str
    preview: Path | None = None


@dataclass
class Made:
    """A mesh (trimesh), the volume it was cut from, and how its picture's background was found."""

    mesh: Any
    volume: Any
    background: str


class Mesh:
    """Meshes of pictures."""

    makes: Makes = "mesh"
    things = "meshes"
    job = MeshJob
    options = in_lines(options.IMAGES, options.SAMPLING, options.MESH, options.ROUTERS, options.MESH_OUTPUT)
    subject, joined_by, list_option = "image", "views", "images_file"
    missing = "no picture given; try: edit generate-3d cat.png -o cat.glb"
    example = '{"image": "cat.png", "seed": 1}'
    stages = {  # noqa: RUF012 - never changed
        "load": "loading",
        "condition": "conditioning",
        "denoise": "denoising",
        "decode": "volume decoding",
        "extract": "extraction",
        "clean": "clean-up",
    }
    """condition: pictures to embeddings. decode: latents to a sampled field. extract: that to triangles."""
    suffixes = MESH_SUFFIXES
    beside: Mapping[str, tuple[str, ...]] = {"preview": (".png",)}
    placeholders: Mapping[str, str] = {}
    recorded_fields = (
        "seed", "steps", "guidance", "octree_resolution", "decode", "faces", "remove_background",
    )  # fmt: skip
    per_row = (
        "images", "seed", "octree_resolution", "decode", "faces", "remove_background",
    )  # fmt: skip
    recorded_rows = ("images", "seed", "remove_background")
    recorded_as: Mapping[str, str] = {"image": "images"}
    imports: tuple[str, ...] = ("skimage.measure", "trimesh", "trimesh.graph", "fast_simplification")
    libraries = ("torch", "numpy", "scikit-image", "trimesh")
    smaller = "a smaller --octree-resolution or --batch-size, --dtype fp16, or on a GPU --offload model"

    def complete(self, fields: Fields, backbone: Backbone, _warnings: list[str]) -> Fields:
        """The model's defaults filled in, views and pictures checked. Raises EditError."""
        image, views = fields["image"], tuple(fields.get("views", ()))
        images = tuple(image) if isinstance(image, (list, tuple)) else (image,)
        if views and not backbone.views:
            raise EditError(
                f"--views needs a multi-view model and {backbone.name!r} takes one picture per mesh; "
                "use -m hunyuan3d-2mv, or leave --views out"
            )
        if views and (len(views) != len(images) or len(set(views)) != len(views)):
            raise EditError(
                f"--views {' '.join(views)!r} must name each of the {len(images)} pictures once, "
                "in their order"
            )
        if len(images) > 1 and not views:
            raise EditError(f"{len(images)} pictures of one object need --views, one name each")
        how = fields.get("remove_background", "auto")
        for name in images:
            read_object(name, how)
        return {
            "images": images, "views": views,
            "octree_resolution": fields.get("octree_resolution", backbone.defaults.octree_resolution),
            "decode": fields.get("decode", "auto"), "faces": fields.get("faces"), "remove_background": how,
        }  # fmt: skip

    def check_path(self, path: Path) -> None:
        """Every format can be written."""

    def title(self, fields: Mapping[str, Any]) -> str:
        """What files are named after: the first picture."""
        return Path(fields["images"][0]).stem

    def size(self, jobs: Sequence[Any]) -> str:
        """The grid."""
        sizes = {f"resolution {job.octree_resolution}" for job in jobs}
        return sizes.pop() if len(sizes) == 1 else "several resolutions"

    def pipe(self, session: Session, _job: Any) -> Any:
        """The only one."""
        return session.pipe

    def shortest(self, job: Any) -> MeshJob:
        """One step, and as few grid cells as can be."""
        shortest: MeshJob = replace(job, steps=1, octree_resolution=8, faces=None)
        return shortest

    def peer(self, row: Mapping[str, Any]) -> Fields:
        """Another row of a recorded batch; its pictures are checked."""
        for name in row["images"]:
            read_object(name, row["remove_background"])
        return {**{name: row[name] for name in self.recorded_rows}, "images": tuple(row["images"])}

    def call(self, session: Session, pipe: Any, jobs: Sequence[Any], on_step: OnStep) -> list[Any]:
        """Condition and denoise together, then decode, extract and clean one by one."""
        import torch

        clock, device, first = session.clock, session.device, jobs[0]
        pictures = [[read_object(name, job.remove_background)[0] for name in job.images] for job in jobs]
        requests: list[Any] = [
            dict(zip(job.views, of, strict=True)) if job.views else of[0]
            for job, of in zip(jobs, pictures, strict=True)
        ]
        with bad_input(), clock.stage("condition", device):
            contexts = pipe.prepare(requests if len(jobs) > 1 else requests[0])
        # one CPU generator per mesh: the same noise in any batch and on any device
        noise = pipe.noise(len(jobs), [torch.Generator("cpu").manual_seed(job.seed) for job in jobs])
        with memory_errors("while denoising", self.smaller), clock.stage("denoise", device):
            latents = pipe.denoise(contexts, noise, first.steps, first.guidance, lambda *_: on_step())
        finite = latents.flatten(1).isfinite().all(dim=1).tolist()
        return [
            self._finish(session, pipe, job, latents[i : i + 1])
            if finite[i]
            else RunError(f"{job.path}: the numbers overflowed; try --dtype fp32 or another picture")
            for i, job in enumerate(jobs)
        ]

    def _finish(self, session: Session, pipe: Any, job: Any, latents: Any) -> Made | RunError:
        """Latents to a clean mesh, or why there is none."""
        from backbones.hunyuan3d.mesh import NoSurfaceError

        try:
            with session.clock.stage("decode", session.device):
                volume = self._decode(session, pipe, job, latents)
            with session.clock.stage("extract"):
                mesh = pipe.extract(volume)
        except RunError as error:
            return error
        except NoSurfaceError as error:
            # the level is not an option: what helps is another seed, more steps or another picture
            reason = str(error).split(";")[0]
            return RunError(f"{job.images[0]}: {reason}; try another --seed, more --steps or another picture")
        with session.clock.stage("clean"):
            mesh = pipe.clean(mesh, job.faces)
            _colour(mesh, job)
        session.notes += _shortcomings(job, mesh)
        return Made(mesh, volume, read_object(job.images[0], job.remove_background)[1])

    def _decode(self, session: Session, pipe: Any, job: Any, latents: Any) -> Any:
        """The volume: hierarchical unless asked otherwise, or unless a dense grid does not fit in memory."""
        cells = job.octree_resolution
        method, points, free = job.decode, (cells + 1) ** 3, available_bytes()
        if points * SPARSE_BYTES > free:
            fits = max(8, int((free / SPARSE_BYTES) ** (1 / 3)) - 1)
            raise RunError(
                f"--octree-resolution {cells} needs about {points * SPARSE_BYTES / GIB:.1f} GiB of memory "
                f"and {free / GIB:.1f} GiB are free; at most {fits} fits"
            )
        methods = ["dense", "hierarchical"] if method == "dense" else ["hierarchical"]
        if method == "dense" and points * DENSE_BYTES > free:
            session.notes.append(_no_room(cells, free))
            methods = methods[1:]
        for way in methods:
            try:
                with memory_errors(f"at --octree-resolution {cells}", self.smaller):
                    return pipe.decode(latents, cells, method=way)[0]
            except ValueError as error:  # noqa: PERF203 - two methods; NaN in the field: PERF203 - two methods
                raise RunError(str(error)) from error
            except RunError:
                if way == methods[-1]:
                    raise
                session.notes.append(_no_room(cells, available_bytes()))
        raise AssertionError("one of the methods returns or raises")

    def encode(self, job: Any, made: Made, record: Mapping[str, Any]) -> dict[Path, bytes]:
        """glb, obj, ply or stl; and the turntable."""
        files = {job.path: encode_mesh(made.mesh, job.path.suffix, record)}
        if job.preview is not None:
            from edit_cli.generation.turntable import turntable

            files[job.preview] = encode_picture(turntable(made.mesh), ".png", {})
        return files

    def safest(self, _path: Path) -> str:
        """The suffix of a file that can be written whatever is made."""
        return ".glb"

    def read_record(self, path: str) -> dict[str, Any]:
        """From a GLB."""
        return read_mesh(path)

    def inputs(self, job: Any) -> dict[str, Any]:
        """Of a record: the pictures of the object."""
        return {
            "images": [str(Path(image).resolve()) for image in job.images],
            "image_hashes": [hashlib.sha256(Path(i).read_bytes()).hexdigest()[:16] for i in job.images],
            "views": list(job.views),
        }

    def record(self, job: Any, session: Session) -> dict[str, Any]:
        """Pictures and sampler."""
        return {**self.inputs(job), "solver": job.solver}

    def facts(self, made: Made) -> dict[str, Any]:
        """Counts and size of the mesh, and where it came from."""
        mesh = made.mesh
        return {
            "faces": len(mesh.faces),
            "vertices": len(mesh.vertices),
            "watertight": bool(mesh.is_watertight),
            "volume": round(float(mesh.volume), 5),
            "bounds": [[round(float(x), 4) for x in corner] for corner in mesh.bounds],
            "background": made.background,
            "evaluated": round(made.volume.evaluated_share, 4),
        }

    def told(self, _job: Any, facts: Mapping[str, Any]) -> str:
        """How good the mesh is, and how much of the grid it took."""
        closed = "watertight" if facts["watertight"] else "not watertight"
        return f"{facts['faces']} faces, {closed}, {facts['evaluated']:.1%} of the grid's points evaluated"

    def thumbnail(self, made: Made) -> Image.Image:
        """The mesh from the front."""
        from edit_cli.generation.turntable import turntable

        return turntable(made.mesh, THUMBNAIL).crop((0, 0, THUMBNAIL, THUMBNAIL))

    def identity(self, job: Any) -> str:
        """A hash of the pictures' files."""
        return " ".join(hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in job.images)

    def workload(self, session: Session, jobs: Sequence[Any], rows: int) -> MeshWorkload:
        """Shapes of pictures, each embedded once; multi-view models take it for the front view."""
        from backbones.workloads import MeshWorkload, embed

        first, names = jobs[0], dict.fromkeys(job.images[0] for job in jobs)
        pictures = [read_object(name, first.remove_background)[0] for name in names]
        contexts = embed(session.pipe, pictures)
        return MeshWorkload(
            session.pipe, session.plan.backbone, rows, first.steps, first.guidance, contexts, len(jobs),
            seed=first.seed,
        )  # fmt: skip

    def comparison_path(self, path: Path, compare: str) -> Path:
        """The dense or exact mesh."""
        return path.with_name(f"{path.stem}-{compare}{path.suffix}")

    def compare(self, made: Made, dense: Made) -> dict[str, float]:
        """Chamfer distance as a share of the box, F-score and volume IoU."""
        from edit_cli.generation.closeness import compare_meshes

        return compare_meshes(made.mesh, dense.mesh, made.volume, dense.volume)

    def encode_comparison(self, made: Mapping[str, Made], suffix: str) -> bytes:
        """The exact mesh if there is one, else the dense one."""
        return encode_mesh(made.get("exact", made["dense"]).mesh, suffix, {})

    def compared_seconds(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """By stage, from denoising on."""
        later = [name for name in self.stages if name not in ("load", "condition")]
        return {name: round(seconds[name], 4) for name in later}

    def comparison_line(self, comparison: Mapping[str, Any]) -> str:
        """Seconds by stage, distances."""
        dense, elastic = comparison["dense_seconds"], comparison["elastic_seconds"]
        stages = ", ".join(f"{self.stages[name]} {dense[name]:.2f} s" for name in dense)
        chamfer, f_score, iou = (fmean(comparison[name]) for name in ("chamfer", "f_score", "iou"))
        return (
            f"{stages}; denoising {elastic['denoise']:.2f} s elastic: measured time ratio "
            f"{comparison['time_ratio']:.2f}; Chamfer {chamfer:.2%} of the box, "
            f"F-score {f_score:.3f} at 1 %, volume IoU {iou:.3f}{_beside_dense(comparison)}"
        )

    def calls(self, job: Any, backbone: Backbone) -> list[CallSize]:
        """One call, with a row for each branch."""
        return [CallSize(rows=backbone.branches(job.guidance), views=max(len(job.views), 1))]

    def latent(self, _job: Any, backbone: Backbone) -> int:
        """Values of the latents."""
        params = registry.component_configs(backbone)["vae"]["params"]
        return int(params["num_latents"] * params["embed_dim"])

    def stream(self, _job: Any, backbone: Backbone) -> int:
        """Values of the latents' residual stream between two blocks."""
        configs = registry.component_configs(backbone)
        tokens, width = configs["vae"]["params"]["num_latents"], configs["model"]["params"]["hidden_size"]
        return int(tokens * width)

    def needs(self, jobs: Sequence[Any]) -> dict[str, tuple[float, str]]:
        """The grid that the surface is cut from."""
        job = max(jobs, key=lambda job: job.octree_resolution)
        point = DENSE_BYTES if job.decode == "dense" else SPARSE_BYTES
        grid = point * (job.octree_resolution + 1) ** 3 / GIB
        return {"grid": (grid, f"about {grid:.2f} GiB of main memory at {self.size([job])}")}


MESH = Mesh()


def _beside_dense(comparison: Mapping[str, Any]) -> str:
    """How near the dense run comes to what was compared with, where that is the exact solution."""
    if "dense_chamfer" not in comparison:
        return ""
    chamfer, iou = fmean(comparison["dense_chamfer"]), fmean(comparison["dense_iou"])
    return f" to the exact solution; the dense run: Chamfer {chamfer:.2%}, volume IoU {iou:.3f}"


def _shortcomings(job: MeshJob, mesh: Any) -> list[str]:
    """What a mesh is not that people take for granted."""
    import numpy as np
    from trimesh.graph import connected_component_labels

    notes = []
    if job.faces is not None and len(mesh.faces) > job.faces:
        notes.append(
            f"{job.path}: {len(mesh.faces)} faces, not {job.faces}: with fewer its surface would tear"
        )
    if not mesh.is_watertight:
        notes.append(f"{job.path}: the surface is not closed; try another --seed or more --faces")
    labels = connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    corners = mesh.triangles
    volumes = np.bincount(
        labels, np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    )
    pieces = int((volumes > 0).sum())  # hollows have shells of their own, inside out
    if pieces > 1:
        notes.append(f"{job.path}: {pieces} pieces that do not touch; another --seed may give one")
    return notes


def read_object(path: str, how: str) -> tuple[Image.Image, str]:
    """`cutout.read_object`, which imports NumPy and Pillow: `edit --help` can do without."""
    from edit_cli.generation import cutout

    return cutout.read_object(path, how)


def _colour(mesh: Any, job: MeshJob) -> None:
    """Vertex colours from the job's pictures."""
    from edit_cli.generation.colours import colour

    pictures = [read_object(image, job.remove_background)[0] for image in job.images]
    colour(mesh, dict(zip(job.views or ("front",), pictures, strict=True)))


def available_bytes() -> int:
    """Main memory that can be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def _no_room(cells: int, free: int) -> str:
    return (
        f"too little memory for a dense grid of {cells} cells per axis "
        f"({(cells + 1) ** 3 * DENSE_BYTES / GIB:.1f} GiB, {free / GIB:.1f} GiB free): decoded hierarchically"
    )
