"""What is said of a model, as plain data. No torch here: argument checks read this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from routers.spec import TransformerSpec

Config = Mapping[str, Any]
"""A component's `config.json` (diffusers), or a section of `config.yaml` (Hunyuan3D), as read from disk."""

Configs = Mapping[str, Config]
"""Configurations by component: "transformer" and "vae"; for Hunyuan3D the sections of `config.yaml`."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and shapes of a checkpoint file, as its header gives them."""

PACKAGE_FOLDER = Path(__file__).resolve().parent

DIFFUSERS, HUNYUAN3D = "model_index.json", "config.yaml"
"""The file that a model folder of a layout has."""

OFFLOADS = ("none", "model", "sequential", "group")
QUANTISED = ("fp8", "int8", "nf4")
"""What `--quantize` knows (quantise.py)."""
DTYPES = ("auto", "fp32", "bf16", "fp16")
SOLVERS = ("euler", "ab2", "dpm++2m")
"""How a sampler steps from one time to the next (solvers.py); "euler" is what the families come with."""

GIB = 2**30
SMALL_MODEL = 10**9
"""Below this many parameters a model is small."""


Makes = Literal["picture", "video", "sound", "mesh"]

COMMANDS: Mapping[Makes, tuple[str, str]] = {
    "picture": ("pictures", "edit generate"),
    "video": ("videos", "edit generate"),
    "sound": ("sounds", "edit generate"),
    "mesh": ("meshes", "edit generate-3d"),
}
"""What models make: the plural, and the command for it."""


@dataclass(frozen=True)
class Defaults:
    """What a request uses when the user says nothing; None where it does not apply, or the pipeline decides.

    steps: denoising steps. guidance: guidance scale. width, height: px.
    max_sequence_length: prompt length in tokens the checkpoint was trained with.
    octree_resolution: grid cells per axis. frames: of a video. fps: frames per second. seconds: of sound.
    """

    steps: int = 50
    guidance: float = 4.0
    width: int | None = None
    height: int | None = None
    max_sequence_length: int | None = None
    octree_resolution: int | None = None
    frames: int | None = None
    fps: float | None = None
    seconds: float | None = None


PICTURE_FIELDS = ("width", "height", "steps", "guidance", "max_sequence_length")
DEFAULT_FIELDS: Mapping[Makes, tuple[str, ...]] = {
    "picture": PICTURE_FIELDS,
    "video": (*PICTURE_FIELDS, "frames", "fps"),
    "sound": ("steps", "guidance", "max_sequence_length", "seconds"),
    "mesh": ("steps", "guidance", "octree_resolution"),
}
"""Which `Defaults` a model folder may change in its `edit.json`."""


@dataclass(frozen=True)
class Traits:
    """What a family reads out of a model's configurations. Fields as in `Backbone`."""

    defaults: Defaults
    size_multiple: int = 1
    guided: bool = True
    takes_guidance: bool = True
    views: bool = False


@dataclass(frozen=True)
class CallSize:
    """How large one transformer call is.

    rows: of the batch. width, height: px. text: text tokens. views: pictures of one object.
    frames: of a video.
    """

    rows: int = 1
    width: int = 0
    height: int = 0
    text: int = 0
    views: int = 1
    frames: int = 1


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
    """What all checkpoints of one kind share.

    name: for people and reports ("Qwen-Image"). makes: what its models make.
    transformer: what `routers` needs to know of the denoiser; without blocks where nobody wrote it down.
    traits: a model's configurations -> what holds for it and its requests.
    call_inputs: configurations and size -> arguments of one transformer call as meta tensors, to count FLOPs.
    layout: the file that a model folder of this family has.
    pipeline_class: its class; in diffusers' layout `_class_name` in `model_index.json`, which recognises
        folders and hub ids. (Hunyuan3D is recognised by the transformer's class.)

    dtype: what models run in by default unless they are small. offloads: ways to offload, of OFFLOADS.

    Of families that take a prompt:
    negative_prompt: default of the second, unconditional branch, "" for the pipeline's own; None if the
        family has no such branch.
    text_tokens: (prompt, max_sequence_length) -> about how many text tokens the transformer sees.
    single_files: layouts of single-file checkpoints that can be read.
    """

    name: str
    makes: Makes
    transformer: TransformerSpec
    traits: Callable[[Configs], Traits]
    call_inputs: Callable[[Configs, CallSize], dict[str, Any]]
    pipeline_class: str
    layout: str = DIFFUSERS
    dtype: str = "bf16"
    offloads: tuple[str, ...] = OFFLOADS
    negative_prompt: str | None = None
    text_tokens: Callable[[str, int | None], int] = lambda prompt, limit: 0
    single_files: tuple[FileLayout, ...] = ()


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

    source: absolute folder path, or hub id (owner/name, for Hunyuan3D with /subfolder).
    defaults: for requests.
    licence, summary: for people.
    parameters: of all components together, 0 if unknown; `transformer_parameters` of the denoiser alone, of
        either where two `transformers` of a kind share the steps.
    size_multiple: both sides of a picture must be divisible by this many px.
    guided: whether guidance above 1 runs a second, unconditional branch.
    takes_guidance: whether the guidance scale has any effect.
    views: whether it takes several named views of one object.
    packaged: its weights are part of this package.
    bundle: folder of the routers used by default, or None.
    batch_size: results made together by default.
    file: a single-file checkpoint whose denoiser takes the place of the source's.
    static: what `edit.json` says of a transformer that was made smaller for good, or None.
    """

    name: str
    family: Family
    source: str
    defaults: Defaults
    licence: str = "see the model's own card"
    summary: str = ""
    parameters: int = 0
    transformer_parameters: int = 0
    transformers: int = 1
    size_multiple: int = 1
    guided: bool = True
    takes_guidance: bool = True
    views: bool = False
    packaged: bool = False
    bundle: Path | None = None
    batch_size: int = 1
    file: SingleFile | None = None
    static: Config | None = field(default=None, hash=False)

    @property
    def makes(self) -> Makes:
        """What it makes."""
        return self.family.makes

    @property
    def address(self) -> str:
        """What `--model` finds this model by, on this machine."""
        if self.file is not None:
            return str(self.file.path)
        return self.name if self.packaged else self.source

    @property
    def folder(self) -> Path | None:
        """The model folder if the source is a path, else None (a hub id)."""
        return Path(self.source) if Path(self.source).is_absolute() else None

    @property
    def small(self) -> bool:
        """Whether it runs in fp32 by default and may make several results at once."""
        return 0 < self.parameters < SMALL_MODEL

    @property
    def memory_gib(self) -> float:
        """GiB of all weights: fp32 for small models, bf16 for the rest."""
        return round((4 if self.small else 2) * self.parameters / GIB, 2 if self.small else 1)

    def branches(self, guidance: float) -> int:
        """How often the transformer sees a sample at each step: 2 with classifier-free guidance, else 1."""
        return 2 if self.guided and guidance > 1 else 1


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
    quantize: one of QUANTISED, or "". vae_tiling: decode pictures tile by tile.
    """

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    compile: bool = False
    loras: tuple[Lora, ...] = ()
    quantize: str = ""
    vae_tiling: bool = False
