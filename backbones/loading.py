"""Load a pipeline for a Backbone: device, dtype, offloading, LoRA, compile. And count what it costs."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backbones.hunyuan3d.folders import cached_folder
from backbones.lora import add_loras
from backbones.model_files import (
    LFS,
    ROUTERS_FOLDER,
    ModelError,
    cached_file,
    first_line,
    hub_message,
    is_pointer,
    read_json,
    require_hub,
)
from backbones.pipeline_call import known_call
from backbones.processors import without_video
from backbones.quantise import check_quantise, quantisation
from backbones.registry import FAMILIES, component_configs
from backbones.spec import DIFFUSERS, HUNYUAN3D, Backbone, CallSize, Placement
from backbones.weights import build_transformer, load_transformer
from routers.meta import transformer_flops

if TYPE_CHECKING:
    from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FINGERPRINT_BLOCKS = 16
FINGERPRINT_BYTES = 65536


def pick_device(name: str) -> torch.device:
    """Name "auto": cuda, else mps, else cpu; anything else is checked to exist. Raises ModelError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name!r} is unknown; allowed are auto, cuda, cuda:N, mps, cpu") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        others = ", ".join(kind for kind, present in available.items() if present and kind != device.type)
        raise ModelError(
            f"--device {name} is not available here; this machine has {others}; leave --device out to pick"
        )
    return device


def card(kind: str) -> str | None:
    """Name of the current GPU, with the versions of its driver and of CUDA: their kernels decide over the
    last bits of a result. kind: a device's type; None for others than a GPU.
    """
    if kind != "cuda":
        return None
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    name = torch.cuda.get_device_name()
    return f"{name}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, CUDA {torch.version.cuda}"


def pick_dtype(name: str, backbone: Backbone, device: torch.device) -> torch.dtype:
    """Name "auto": fp32 for small models (faster and exact on a CPU), else what the family was made for.

    A CPU computes in fp16 far slower than in fp32, so there it is fp32.
    """
    if name == "auto":
        name = "fp32" if backbone.small else backbone.family.dtype
        name = "fp32" if name == "fp16" and device.type == "cpu" else name
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `--dtype` knows it by; inverse of DTYPES."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def load(
    backbone: Backbone, placement: Placement, transformer: Any = None, notes: list[str] | None = None
) -> Any:
    """A ready pipeline: diffusers' for pictures, Hunyuan3D's for meshes. Both have transformer and scheduler.

    Folders need no network; a hub model is read from its own repository.
    transformer: an already loaded denoiser to put in place of the checkpoint's own (diffusers only).
    notes: gets what a user should know of it, such as parts of a LoRA without effect.
    Raises ModelError for anything the user can mend.
    """
    device = pick_device(placement.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and memory are asked of the current device
    dtype = pick_dtype(placement.dtype, backbone, device)
    if placement.offload != "none" and device.type == "cpu":
        raise ModelError(
            f"--offload {placement.offload} needs a GPU to offload from, this run uses the CPU; leave it out"
        )
    if placement.quantize:
        check_quantise(placement.quantize, backbone, device.type)
    with quiet_libraries():
        if backbone.family.layout == HUNYUAN3D:
            pipe = _load_hunyuan3d(backbone, placement, device, dtype)
        else:
            pipe = _load_diffusers(
                backbone, placement, device, dtype, transformer, [] if notes is None else notes
            )
    if placement.compile:
        # per block: seconds instead of minutes to compile, and routers still see every block
        for block in blocks(pipe.transformer, backbone):
            block.compile()
    return pipe


def blocks(transformer: Any, backbone: Backbone) -> list[Any]:
    """All transformer blocks, in order."""
    return [b for spec in backbone.family.transformer.blocks for b in transformer.get_submodule(spec.path)]


@functools.lru_cache(maxsize=2)
def meta_transformer(backbone: Backbone) -> Any:
    """The transformer without weights, on the meta device. Raises ModelError."""
    with torch.device("meta"):
        return build_transformer(backbone).eval()


@functools.lru_cache(maxsize=64)
def call_flops(backbone: Backbone, size: CallSize) -> float:
    """FLOPs of one dense transformer call, counted on the meta device. Raises ModelError."""
    inputs = backbone.family.call_inputs(component_configs(backbone), size)
    return float(transformer_flops(meta_transformer(backbone), inputs))


def around(pipe: Any, pipeline: str) -> Any:
    """A pipeline of another class around the same components."""
    import diffusers

    with quiet_libraries():
        other = getattr(diffusers, pipeline).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def model_hash(backbone: Backbone) -> str | None:
    """Fingerprint of the denoiser's weights; None if a hub model is not in the local cache after all."""
    if backbone.file is not None:
        return fingerprint(backbone.file.path)
    if backbone.family.layout == HUNYUAN3D:
        folder = backbone.folder or cached_folder(backbone.source)
        return fingerprint(folder) if folder else None
    index = None if backbone.folder else cached_file(backbone.source, DIFFUSERS)
    folder = index.parent if index else backbone.folder
    return fingerprint(folder / "transformer") if folder else None


def fingerprint(folder: Path) -> str:
    """Short hash that tells checkpoints apart in milliseconds: sizes, and 16 samples of 64 KiB per file.

    folder: a folder of safetensors files, or one file. A bundle in `routers/` is not of the checkpoint.
    """
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    for file in files:
        if file.parent == folder / ROUTERS_FOLDER:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(FINGERPRINT_BLOCKS):
                stream.seek(max(0, size - FINGERPRINT_BYTES) * i // (FINGERPRINT_BLOCKS - 1))
                digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep library progress bars and advice off the user's terminal, unless EDIT_DEBUG is set."""
    if os.environ.get("EDIT_DEBUG"):
        yield
        return
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for module in (diffusers_logging, transformers_logging):
        module.disable_progress_bar()
        module.set_verbosity_error()
    for name in ("huggingface_hub", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load_hunyuan3d(
    backbone: Backbone, placement: Placement, device: torch.device, dtype: torch.dtype
) -> Hunyuan3DPipeline:
    from backbones.hunyuan3d.checkpoints import load_pipeline

    if placement.loras:
        raise ModelError(f"--lora is not for {backbone.family.name}; leave it out")
    if placement.offload not in backbone.family.offloads:
        raise ModelError(
            f"--offload {placement.offload} is not for {backbone.family.name}; "
            f"it knows {', '.join(backbone.family.offloads)}"
        )
    return load_pipeline(backbone.source, dtype=dtype, device=device, offload=placement.offload == "model")


def _load_diffusers(
    backbone: Backbone, placement: Placement, device: torch.device, dtype: torch.dtype, transformer: Any,
    notes: list[str],
) -> Any:  # fmt: skip
    from_file = backbone.file is not None and transformer is None
    if transformer is None and backbone.static is not None:
        transformer = load_transformer(backbone, dtype)
    # a single file is read last: what else is missing shows at once, not after 24 GB
    components = _special(backbone)
    components |= {"transformer": transformer} if from_file or transformer is not None else {}
    quantize = placement.quantize and transformer is None
    pipe = _from_pretrained(backbone, dtype, components, placement if quantize and not from_file else None)
    if from_file:
        pipe.register_modules(transformer=load_transformer(backbone, dtype))
    if placement.loras:
        notes += add_loras(pipe, placement.loras)
    if quantize and from_file:
        pipe.transformer.enable_layerwise_casting(compute_dtype=dtype)
    if placement.vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise ModelError(f"--vae-tiling: {backbone.name} has no VAE that decodes in tiles; leave it out")
        pipe.vae.enable_tiling()
    _place(pipe, device, placement.offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_pretrained(
    backbone: Backbone, dtype: torch.dtype, components: dict[str, Any], packed: Placement | None = None
) -> Any:
    """packed: how weights are quantised, None: not at all."""
    import diffusers

    pipeline_class = getattr(diffusers, backbone.family.pipeline_class)
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, **components}
    if packed is not None:
        file = backbone.folder / DIFFUSERS if backbone.folder else cached_file(backbone.source, DIFFUSERS)
        if file is None:
            raise ModelError(f"--quantize needs {backbone.source!r} on this machine: edit download it first")
        options["quantization_config"] = quantisation(packed, read_json(file), dtype)
    try:
        return pipeline_class.from_pretrained(backbone.source, local_files_only=True, **options)
    except Exception as error:
        if backbone.folder is not None:
            pointer = next(filter(is_pointer, sorted(backbone.folder.rglob("*.safetensors"))), None)
            reason = first_line(error) if pointer is None else f"{str(pointer)!r}: {LFS}"
            raise ModelError(f"{backbone.source!r} cannot be loaded: {reason}") from error
        if backbone.file is not None and not backbone.file.named:
            raise ModelError(
                f"{backbone.file.path.name!r} holds the transformer alone; its text encoders and VAE are "
                f"those of {backbone.source!r}, which is not in the local cache; "
                f"give --base FOLDER, or --base {backbone.source} to download them"
            ) from error
    try:
        require_hub()
        return pipeline_class.from_pretrained(backbone.source, **options)
    except Exception as error:  # the hub client has a dozen error types; the user needs one line
        raise ModelError(hub_message(backbone.source, error)) from error


def _special(backbone: Backbone) -> dict[str, Any]:
    """Components that a pipeline is given: what its class asks for and a folder was saved without, as None;
    and what cannot be loaded as it is.
    """
    file = backbone.folder / DIFFUSERS if backbone.folder else cached_file(backbone.source, DIFFUSERS)
    if file is None or backbone.family in FAMILIES:
        return {}
    index, call = read_json(file), known_call(backbone.family.pipeline_class)
    absent = {name: None for name in call.components if index.get(name) == [None, None]}
    return absent | without_video(index, backbone.source)


def _place(pipe: Any, device: torch.device, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        # whole blocks move, the next one while this one computes (CUDA streams)
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )
    else:
        pipe.to(device)
