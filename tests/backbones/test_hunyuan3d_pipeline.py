"""The way from pictures to meshes: stages, callbacks, reproducible rows, picture and view handling."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from backbones.hunyuan3d.conditioner import SingleImageEncoder, view_embedding
from backbones.hunyuan3d.config import build
from backbones.hunyuan3d.image_processor import (
    ImageProcessor,
    MultiViewImageProcessor,
    resample_weights,
    resize_area,
)
from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline, denoise
from backbones.hunyuan3d.schedulers import ConsistencyFlowMatchEulerScheduler, FlowMatchEulerScheduler
from backbones.tiny.recipes.shapes.point_encoder import EncodingShapeVAE, farthest_points
from tests.hunyuan3d_tiny import CONFIG, ENCODER, VAE_PARAMS, components


def picture(color: str = "red") -> Image.Image:
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 5, 30, 24), fill=color)
    return image


def pipeline() -> Hunyuan3DPipeline:
    parts = components()
    return Hunyuan3DPipeline(
        parts["model"], parts["vae"], parts["conditioner"], FlowMatchEulerScheduler(), ImageProcessor(32)
    )


SMALL = {"num_steps": 3, "octree_resolution": 16}


def test_callbacks_follow_steps_and_decoding():
    steps, decoded = [], []
    out = pipeline()(
        picture(),
        **SMALL,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda done, total, latents: steps.append((done, total, tuple(latents.shape))),
        on_decode=lambda done, needed: decoded.append((done, needed)),
    )
    assert steps == [(i, 3, (1, 12, 8)) for i in (1, 2, 3)]
    assert decoded[-1][0] == decoded[-1][1] > 17**3 / 10
    assert out.latents.shape == (1, 12, 8)


def test_a_row_equals_the_same_request_alone():
    pipe = pipeline()
    pictures = [picture("red"), picture("blue")]
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    together = pipe(pictures, **SMALL, generator=generators).latents
    alone = pipe(pictures[1], **SMALL, generator=torch.Generator().manual_seed(2)).latents
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_dense_and_hierarchical_meshes_agree_and_the_second_run_repeats_the_first():
    pipe = pipeline()
    runs = [
        pipe(
            picture(),
            num_steps=2,
            octree_resolution=40,
            method=method,
            generator=torch.Generator().manual_seed(3),
            level=level,
        )
        for method in ("dense", "hierarchical")
        for level in [_median_level(pipe)]
    ]
    assert torch.equal(runs[0].latents, runs[1].latents)
    first, second = runs[0].meshes[0], runs[1].meshes[0]
    assert first is not None
    assert first.is_watertight
    assert np.abs(first.bounds - second.bounds).max() < 1e-3 * 2.02
    assert len(first.faces) == len(second.faces)


def _median_level(pipe: Hunyuan3DPipeline) -> float:
    out = pipe(picture(), num_steps=2, octree_resolution=16, generator=torch.Generator().manual_seed(3))
    return float(np.median(pipe.decode(out.latents, 16, method="dense")[0].logits))


def test_no_surface_gives_no_mesh():
    assert pipeline()(picture(), **SMALL, level=1e6).meshes == [None]


def test_offload_and_bad_requests():
    pipe = pipeline()
    expected = pipe(picture(), **SMALL, generator=torch.Generator().manual_seed(0)).latents
    pipe.to("cpu", offload=True)
    assert torch.equal(pipe(picture(), **SMALL, generator=torch.Generator().manual_seed(0)).latents, expected)
    with pytest.raises(ValueError, match="multi-view"):
        pipe({"front": picture()}, **SMALL)
    with pytest.raises(ValueError, match="'hierarchical' or 'dense'"):
        pipe(picture(), **SMALL, method="octree")
    with pytest.raises(ValueError, match="2 generators for 1"):
        pipe(picture(), **SMALL, generator=[torch.Generator()] * 2)
    pipe.conditioner = None
    with pytest.raises(ValueError, match="comes without a conditioner"):
        pipe(picture(), **SMALL)


class Affine(torch.nn.Module):
    """v = mean of the context, so that guidance can be computed by hand; keeps what it was called with."""

    def __init__(self, guidance_embed: bool):
        super().__init__()
        self.guidance_embed, self.calls = guidance_embed, []

    def forward(self, x, t, contexts, guidance=None):
        self.calls.append((x.shape[0], t.tolist(), guidance))
        return contexts["main"].mean(dim=(1, 2), keepdim=True).expand_as(x)


def test_guidance_by_hand():
    context = {"main": torch.full((2, 3, 4), 0.5)}
    noise = torch.zeros(2, 5, 8)
    model = Affine(False)
    # v = 0 + 4 * (0.5 - 0) over effective times 0 -> 1
    assert torch.allclose(
        denoise(model, FlowMatchEulerScheduler(), noise, context, 5, 4.0), torch.full_like(noise, 2.0)
    )
    assert [n for n, _, _ in model.calls] == [
        4
    ] * 5  # conditional and unconditional rows, last step of size zero
    assert [t[0] for _, t, _ in model.calls] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    plain, distilled = Affine(False), Affine(True)
    for scale in (0.0, 1.0):
        unguided = denoise(plain, FlowMatchEulerScheduler(), noise, context, 5, scale)
        assert torch.allclose(unguided, torch.full_like(noise, 0.5))
    denoise(distilled, ConsistencyFlowMatchEulerScheduler(), noise, context, 5, 4.0)
    assert {rows for rows, _, _ in plain.calls + distilled.calls} == {2}
    assert distilled.calls[0][2].tolist() == [4.0, 4.0]
    assert [t[0] for _, t, _ in distilled.calls] == pytest.approx(
        [0, 0.1992, 0.3994, 0.5996, 0.7998], abs=1e-4
    )


def test_multi_view():
    parts = copy.deepcopy(CONFIG)
    parts["conditioner"]["params"]["main_image_encoder"] = {**ENCODER, "type": "DinoImageEncoderMV"}
    torch.manual_seed(0)
    conditioner = build("conditioner", parts["conditioner"])
    assert isinstance(conditioner, SingleImageEncoder)
    base = components()
    pipe = Hunyuan3DPipeline(
        base["model"], base["vae"], conditioner, FlowMatchEulerScheduler(), MultiViewImageProcessor(32)
    )
    front, back = picture("red"), picture("green")
    views = pipe.prepare({"back": back, "front": front})["main"]
    assert torch.equal(
        views, pipe.prepare({"front": front, "back": back})["main"]
    )  # sorted by view, not by name
    alone = pipe.prepare(front)["main"]
    torch.testing.assert_close(views[:, : alone.shape[1]], alone)
    shift = view_embedding(2, 24) - view_embedding(0, 24)
    moved = pipe.prepare({"back": front})["main"]
    torch.testing.assert_close(moved, alone + shift)
    assert conditioner.unconditional(1, 2)["main"].shape == views.shape
    with pytest.raises(ValueError, match="top"):
        pipe.prepare({"top": front})


def test_pictures_without_foreground_are_refused():
    for alpha_box in (None, (5, 5, 5, 20)):
        image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
        if alpha_box:
            ImageDraw.Draw(image).rectangle(alpha_box, fill="red")
        with pytest.raises(ValueError, match="no foreground"):
            ImageProcessor(32)(image)
    with pytest.raises(ValueError, match="border_ratio"):
        ImageProcessor(32, 1.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_the_foreground_is_centred_on_white(mode):
    done = ImageProcessor(64)(picture().convert(mode))
    image, mask = done["image"], done["mask"]
    assert image.shape == (1, 3, 64, 64)
    assert mask.shape == (1, 1, 64, 64)
    assert torch.equal(image[..., 0, 0], torch.ones(1, 3))
    if mode == "RGBA":
        rows, columns = np.nonzero(mask[0, 0].numpy() > 0)
        assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 1
        assert abs((rows.min() + rows.max()) / 2 - 31.5) <= 1
        assert abs(columns.max() - columns.min() + 1 - 0.85 * 64) <= 2


def test_area_resampling_keeps_the_mean_when_shrinking_and_constants_always():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (30, 45, 4), dtype=np.uint8)
    small = resize_area(image, 7, 11)
    assert np.abs(small.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 0.6
    flat = np.full((9, 8, 4), 77, np.uint8)
    for size in ((3, 3), (20, 5), (31, 17)):
        assert (resize_area(flat, *size) == 77).all()


def test_a_large_photo_is_resampled_with_as_many_weights_as_it_has_pixels():
    for shrink, n_out in ((True, 2700), (False, 5000)):
        assert resample_weights(4000, n_out, shrink).nnz <= 2 * max(4000, n_out)


@pytest.mark.parametrize("faint", [1, 20])
def test_faint_alpha_far_from_the_object_does_not_shrink_it(faint):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[20:40, 25:45] = (200, 30, 30, 255)
    alone = ImageProcessor(32)(Image.fromarray(rgba))["mask"]
    rgba[0, 0, 3] = rgba[63, 63, 3] = faint
    assert torch.equal(ImageProcessor(32)(Image.fromarray(rgba))["mask"], alone)
    rgba[..., 3] //= 20  # a picture that is faint as a whole shows what it shows
    assert ImageProcessor(32)(Image.fromarray(rgba))["mask"].max() > -1


def test_encoder_round_trip_shapes_and_randomness():
    torch.manual_seed(0)
    vae = EncodingShapeVAE(**VAE_PARAMS).eval()
    surface = torch.randn(2, 60, 7)
    with torch.no_grad():
        first, again, other = (vae.encode(surface, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.mean.shape == (2, 12, 8)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
    assert first.kl() > 0
    queries, data = vae.select_points(surface, torch.Generator().manual_seed(0))
    assert queries.shape == (2, 12, 7)
    assert data.shape == (2, 24, 7)  # 8 of 12 latents from the random points, twice as many inputs
    with pytest.raises(ValueError, match="takes 60"):
        vae.encode(surface[:, :50])


def test_farthest_points_spread():
    line = torch.linspace(0, 1, 101)[None, :, None].expand(1, 101, 3).contiguous()
    chosen = farthest_points(line, 5, torch.Generator().manual_seed(0))[0]
    assert len(set(chosen.tolist())) == 5
    assert {0, 100} <= set(chosen.tolist())
    gaps = chosen.sort().values.diff()
    assert gaps.min() >= 12
