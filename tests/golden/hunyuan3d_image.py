"""Golden cases of image preprocessing and conditioning."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from backbones.hunyuan3d import checkpoints
from backbones.hunyuan3d.conditioner import DinoImageEncoder, SingleImageEncoder
from backbones.hunyuan3d.image_processor import ImageProcessor

from .runner import Case, Outcome, Tolerance


def run_conditioner(case: Case) -> Outcome:
    """Single-view and multi-view DINOv2 conditioning from weights under their published names."""
    params = case.config["params"]
    actual: dict[str, Tensor] = {}
    if "image" in case.inputs:
        single = _conditioner(case, params)
        image = case.inputs["image"]
        actual["pixel_values"] = single.main_image_encoder.pixel_values(image)
        actual["main"] = single(image)["main"]
        actual["uncond"] = single.unconditional(image.shape[0])["main"]
    if "image_mv" in case.inputs:
        multi = _conditioner(case, {**params, "type": "DinoImageEncoderMV"})
        views = case.inputs["image_mv"]
        actual["main_mv"] = multi(views, view_idxs=case.config["view_idxs"])["main"]
        actual["uncond_mv"] = multi.unconditional(*views.shape[:2])["main"]
    return Outcome(actual)


def _conditioner(case: Case, encoder: dict[str, object]) -> SingleImageEncoder:
    spec = {"target": "SingleImageEncoder", "params": {"main_image_encoder": encoder}}
    module = checkpoints.build_component("conditioner", spec, case.weights)
    assert isinstance(module, SingleImageEncoder)
    return module


def run_image_preprocess(case: Case) -> Outcome:
    """Recentring and resizing of both pictures, at the case's size and at the default 512."""
    params, limits = case.config["params"], case.config["tolerance"]
    pixels = Tolerance(limits["without_opencv_float_atol"], 0.0)
    levels = Tolerance(limits["without_opencv_uint8_levels"], 0.0)
    dino = DinoImageEncoder(
        {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1}, case.config["dino_image_size"]
    )
    actual: dict[str, Tensor] = {}
    tolerances: dict[str, Tolerance] = {}
    for prefix, key in (("", "rgba"), ("opaque.", "rgba_opaque")):
        rgba = case.inputs[key].numpy()
        processor = ImageProcessor(**params)
        rgb, mask = processor.recenter(rgba)
        small = processor(Image.fromarray(rgba))
        large = ImageProcessor(512, params["border_ratio"])(Image.fromarray(rgba))
        values = {
            "recentered_rgb": (torch.from_numpy(rgb), levels),
            "recentered_mask": (torch.from_numpy(mask), levels),
            "image": (small["image"], pixels),
            "mask": (small["mask"], pixels),
            "dino_pixels": (
                dino.pixel_values(small["image"]),
                Tolerance(limits["without_opencv_dino_atol"], 0.0),
            ),
            "image512_stride16": (large["image"][..., ::16, ::16], pixels),
            "mask512_stride16": (large["mask"][..., ::16, ::16], pixels),
            "image512_mean_std": (torch.stack([large["image"].mean(), large["image"].std()]), pixels),
        }
        actual.update({prefix + name: value for name, (value, _) in values.items()})
        tolerances.update({prefix + name: tolerance for name, (_, tolerance) in values.items()})
    return Outcome(actual, tolerances=tolerances)
