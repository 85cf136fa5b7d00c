"""Keywords of `edit_cli.generate` and `generate_3d`, written by `python docs/make_cli.py`."""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict

class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate`."""

    prompts: str | PathLike[str]
    prompts_file: str | PathLike[str]
    steps: int
    num_inference_steps: int
    guidance: float
    guidance_scale: float
    true_cfg_scale: float
    solver: Literal["euler", "ab2", "dpm++2m"]
    sampler: Literal["euler", "ab2", "dpm++2m"]
    seed: int | Literal["random"] | Sequence[int | Literal["random"]]
    negative_prompt: str
    num_images: int
    count: int
    width: int
    height: int
    image: str | PathLike[str] | Sequence[str | PathLike[str]]
    mask: str | PathLike[str]
    control_image: str | PathLike[str]
    strength: float
    frames: int
    num_frames: int
    fps: float
    frame_rate: float
    seconds: float
    replay: str | PathLike[str]
    preset: str
    model: str | PathLike[str]
    base: str | PathLike[str]
    routers: str | PathLike[str]
    budget: float | Sequence[float]
    time: str | PathLike[str]
    target: Literal["dense", "exact"]
    force: bool
    lora: str | PathLike[str] | Sequence[str | PathLike[str]]
    batch_size: int
    device: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    offload: Literal["none", "model", "sequential", "group"]
    compile: bool
    engine: Literal["local", "ray"]
    workers: int
    quantize: Literal["fp8", "int8", "nf4"]
    fit: bool
    vae_tiling: bool

class Generate3dOptions(TypedDict, total=False):
    """Keywords of `generate-3d`."""

    images_file: str | PathLike[str]
    preset: str
    model: str | PathLike[str]
    routers: str | PathLike[str]
    budget: float | Sequence[float]
    time: str | PathLike[str]
    target: Literal["dense", "exact"]
    force: bool
    steps: int
    num_inference_steps: int
    guidance: float
    guidance_scale: float
    true_cfg_scale: float
    solver: Literal["euler", "ab2", "dpm++2m"]
    sampler: Literal["euler", "ab2", "dpm++2m"]
    seed: int | Literal["random"] | Sequence[int | Literal["random"]]
    num_meshes: int
    count: int
    octree_resolution: int
    decode: Literal["auto", "dense", "hierarchical"]
    faces: int
    remove_background: Literal["auto", "yes", "no"]
    views: Literal["front", "left", "back", "right"] | Sequence[Literal["front", "left", "back", "right"]]
    replay: str | PathLike[str]
    batch_size: int
    device: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    offload: Literal["none", "model"]
    compile: bool
    engine: Literal["local", "ray"]
    workers: int
    fit: bool
