"""`--preview FILE`: a picture under way by a linear map of its latents, fitted once for each VAE."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edit_cli.generation.preview import CELL, fit, places, shown


def test_the_map_is_found_where_there_is_one():
    """Latents whose colours are a linear map of them, with channels first and as rows of tokens."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 6, 10, 16)).astype(np.float32)
    mix = rng.normal(size=(6, 3 * CELL**2)) * 20
    cells = latents.transpose(0, 2, 3, 1) @ mix + 128
    pixels = cells.reshape(2, 10, 16, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 20, 32, 3)
    pictures = [Image.fromarray(p.clip(0, 255).astype(np.uint8)).resize((128, 80), 0) for p in pixels]
    for given in (latents, latents.transpose(0, 2, 3, 1).reshape(2, 160, 6)):
        made = shown(places(given, 1.6)[0], fit(given, pictures))
        assert np.abs(np.asarray(made, float) - pixels[0].clip(0, 255)).mean() < 8


@pytest.mark.slow
def test_a_preview_resembles_the_picture(edit_here, tmp_path, monkeypatch):
    """The first run fits the map and keeps it; the second reads it. Both end on the picture that is saved."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request = ["generate", "a red car", "--steps", "8", "-b", "1", "-o", "car.png", "--overwrite", "-q"]
    plain = edit_here(*request, cwd=tmp_path)
    assert plain.code == 0, plain.err
    picture = Image.open(tmp_path / "car.png").convert("RGB")
    for _ in range(2):
        ran = edit_here(*request, "--preview", "live.jpg", cwd=tmp_path)
        assert ran.code == 0, ran.err
        assert Image.open(tmp_path / "car.png").tobytes() == picture.tobytes(), "nothing of the run changes"
        live = Image.open(tmp_path / "live.jpg").resize(picture.size)
        small = picture.resize((16, 16), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BILINEAR)
        distance = np.abs(np.asarray(live, float) - np.asarray(small, float)).mean()
        assert distance < 20 < np.abs(np.asarray(small, float) - 255).mean() + 10
        (kept,) = (tmp_path / "cache" / "edit" / "previews").iterdir()
    assert kept.suffix == ".npy"


REFUSED = [
    ("live.gif", "is not the name of a .png or .jpg file"),
    ("mine.png", "would replace 'mine.png', which is another file"),
    ("cat.png", "would replace 'cat.png', which is another file"),
]


@pytest.mark.parametrize(("file", "message"), REFUSED)
def test_a_preview_replaces_nothing_else(edit_here, tmp_path, file, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    ran = edit_here("generate", "a cat", "-o", "cat.png", "--preview", file, "--dry-run", cwd=tmp_path)
    assert ran.code == 2 and message in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.bench
def test_previews_take_about_a_hundredth_of_the_time(tmp_path):
    from edit_cli.commands.app import COMMANDS
    from edit_cli.generation import loop
    from edit_cli.generation.picture import PICTURE
    from edit_cli.generation.plan import make_plan
    from edit_cli.generation.result import Result, StageClock

    values = {"prompt": ["a red car"], "steps": 500, "budget": 1, "preview": str(tmp_path / "live.png")}
    plan = make_plan(COMMANDS["generate"].request(values)[0], PICTURE, kept=False)
    clock = StageClock(plan.medium.stages)
    session = loop.open_session(Result(plan), clock)
    from edit_cli.generation.preview import Preview

    session.preview = Preview(tmp_path / "live.png")
    session.preview.prepare(session, session.plan.jobs[0])
    before = session.preview.seconds
    session.run(session.plan.jobs)
    share = (session.preview.seconds - before) / clock.seconds["denoise"]
    print(f"{session.preview.written} previews, {share:.2%} of denoising")
    assert session.preview.written >= 2 and share < 0.01
