"""Rows of the backbone registry, as plain data. No torch here: argument checks read this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routers.spec import TransformerSpec

Config = Mapping[str, Any]
"""A component's `config.json` (diffusers), as read from disk."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and shapes of a checkpoint file, as its header gives them."""

PACKAGE_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Defaults:
    """What a request uses when the user says nothing.

    width, height: px. steps: denoising steps. guidance: guidance scale.
    max_sequence_length: prompt length in tokens the checkpoint was trained with; None: the pipeline's own.
    """

    width: int = 1024
    height: int = 1024
    steps: int = 50
    guidance: float = 4.0
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in a single file: `key`, of it the rows [start, stop), None for all.

    swap: its first and second half of rows change places.
    """

    key: str
    start: int | None = None
    stop: int | None = None
    swap: bool = False


@dataclass(frozen=True)
class FileLayout:
    """How single-file checkpoints of a family name the denoiser's tensors.

    marker: a name that a file of this layout holds.
    config: shapes -> the entries of the transformer's config that the file decides.
    parts: transformer config -> where each of the transformer's tensors lies; None: under its own name.
    row: transformer config -> registry row of the model whose other components belong to it.
    """

    marker: str
    config: Callable[[Shapes], Config]
    parts: Callable[[Config], Mapping[str, Part]] | None
    row: Callable[[Config], str]


@dataclass(frozen=True)
class Family:
    """What all checkpoints of one pipeline class share.

    name: for people and reports ("Qwen-Image").
    pipeline_class: `_class_name` in a checkpoint's `model_index.json`; recognises folders and hub ids.
    transformer: what `routers` needs to know of the denoiser.
    guidance_argument: the pipeline's argument that takes `--guidance`.
    negative_prompt: default of the second, unconditional branch; None if the family has no such branch.
    takes_guidance: transformer config -> whether the guidance scale has any effect.
    image_to_image_class: diffusers class for `--image`, built from the loaded pipeline; None: not offered.
    size_multiple: VAE config -> both sides must be divisible by this many px.
    defaults: transformer config -> defaults for checkpoints that have no registry row.
    transformer_inputs: (transformer config, VAE config, width, height, text tokens, batch) -> arguments of
        one transformer call, as meta tensors, to count FLOPs without weights.
    text_tokens: (prompt, max_sequence_length) -> about how many text tokens the transformer sees.
    single_files: layouts of single-file checkpoints that can be read.
    """

    name: str
    pipeline_class: str
    transformer: TransformerSpec
    guidance_argument: str
    negative_prompt: str | None
    image_to_image_class: str | None
    size_multiple: Callable[[Config], int]
    defaults: Callable[[Config], Defaults]
    transformer_inputs: Callable[[Config, Config, int, int, int, int], dict[str, Any]]
    text_tokens: Callable[[str, int | None], int]
    takes_guidance: Callable[[Config], bool] = lambda transformer: True
    single_files: tuple[FileLayout, ...] = ()

    def branches(self, guidance: float) -> int:
        """Transformer calls per step: 2 with classifier-free guidance (scale > 1), else 1."""
        return 2 if self.negative_prompt is not None and guidance > 1 else 1


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint file that holds a denoiser alone.

    prefix: what stands before the layout's names in the file. config: the transformer's.
    base: what text encoders and VAE come from, as the user would name it. named: whether the user did;
        otherwise nothing is fetched for it.
    """

    path: Path
    layout: FileLayout
    prefix: str
    config: Config = field(hash=False)
    base: str
    named: bool


@dataclass(frozen=True)
class Backbone:
    """One model that can be generated with: a registry row, or a folder or hub id that was recognised.

    source: hub id, or absolute folder path.
    file: a single-file checkpoint whose denoiser takes the place of the source's.
    parameters: of all components together; `transformer_parameters` of the denoiser alone.
    memory_gib: estimated GiB to hold every component in bf16 (small models: fp32).
    packaged: its weights are part of this package.
    bundle: folder of the routers used by default, or None.
    batch_size: images generated together by default.
    """

    name: str
    family: Family
    source: str
    licence: str
    parameters: int
    transformer_parameters: int
    memory_gib: float
    defaults: Defaults
    size_multiple: int
    packaged: bool = False
    bundle: Path | None = None
    batch_size: int = 1
    summary: str = ""
    file: SingleFile | None = None

    @property
    def asked(self) -> str:
        """What `--model` finds this model by, on this machine."""
        if self.file is not None:
            return str(self.file.path)
        return self.name if self.packaged else self.source

    @property
    def folder(self) -> Path | None:
        """The pipeline folder if the source is a path, else None (a hub id)."""
        return Path(self.source) if Path(self.source).is_absolute() else None


OFFLOADS = ("none", "model", "sequential", "group")
DTYPES = ("auto", "fp32", "bf16", "fp16")
SOLVERS = ("euler", "ab2", "dpm++2m")
"""How a sampler steps from one time to the next (solvers.py); "euler" is what the families come with."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file (or folder with one) and its strength."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Placement:
    """Where and how a pipeline runs.

    device: "auto", "cuda", "cuda:1", "mps" or "cpu". dtype: one of DTYPES.
    offload: one of OFFLOADS; anything but "none" needs an accelerator. compile: torch.compile of the blocks.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    compile: bool = False
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class MeshDefaults:
    """What a mesh request uses when the user says nothing.

    steps: denoising steps. guidance: guidance scale. octree_resolution: grid cells per axis.
    """

    steps: int = 30
    guidance: float = 5.0
    octree_resolution: int = 256


@dataclass(frozen=True)
class MeshFamily:
    """What all image-to-mesh checkpoints with one transformer class share.

    transformer: what `routers` needs to know of the denoiser; its class name, in a checkpoint's
        `config.yaml`, recognises folders and hub ids.
    is_distilled, takes_views, defaults: sections of `config.yaml` -> whether guidance is an input of the
        model, whether it takes named views of one object, defaults for requests.
    """

    name: str
    transformer: TransformerSpec
    is_distilled: Callable[[Config], bool]
    takes_views: Callable[[Config], bool]
    defaults: Callable[[Config], MeshDefaults]


@dataclass(frozen=True)
class MeshBackbone:
    """One model that makes meshes. Fields as in `Backbone`; source: absolute folder, or hub id/subfolder.

    guided: whether guidance doubles the batch (a scale > 1). views: whether it takes named views.
    """

    name: str
    family: MeshFamily
    source: str
    licence: str
    parameters: int
    transformer_parameters: int
    memory_gib: float
    defaults: MeshDefaults
    guided: bool = True
    views: bool = False
    packaged: bool = False
    bundle: Path | None = None
    summary: str = ""

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder if the source is a path, else None (a hub id)."""
        return Path(self.source) if Path(self.source).is_absolute() else None

    def rows(self, guidance: float) -> int:
        """Batch rows per mesh: 2 with classifier-free guidance (scale > 1), else 1."""
        return 2 if self.guided and guidance > 1 else 1
