"""`edit models` and `edit download` against a hub on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.fake_hub import hub
from tests.conftest import edit_environment
from tests.fresh import Server

SOURCE = "Tongyi-MAI/Z-Image-Turbo"
WEIGHTS = bytes(range(256)) * 60_000  # 15 MB: more than the client's parts of 10 MB
FILES = {
    "model_index.json": json.dumps(
        {
            "_class_name": "ZImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "safety_checker": [None, None],
        }
    ).encode(),
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b'{"_class_name": "ZImageTransformer2DModel"}',
    "transformer/model.safetensors": WEIGHTS,
    "transformer/model.bin": b"the same as a pickle",
    "transformer/model.fp16.safetensors": b"the same in half",
    "assets/teaser.png": b"a picture",
}
WANTED = [
    "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
    "transformer/model.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def online():
    """`edit` without torch and without the tests' HF_HUB_OFFLINE."""
    server = Server(edit_environment(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"))
    yield server
    server.close()


def snapshot_files(cache: Path) -> list[str]:
    (snapshot,) = cache.glob("models--*/snapshots/*")
    return sorted(str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if not file.is_dir())


@pytest.mark.slow  # the hub client waits longer before each of five retries
def test_download_keeps_what_is_finished_and_remove_takes_it_out(online, tmp_path):
    cache = tmp_path / "cache"
    with hub(SOURCE, FILES) as served:
        where = {"HF_ENDPOINT": served.url, "HF_HUB_CACHE": str(cache), "NO_PROXY": "*"}
        served.broken_at, served.for_good = 12_000_000, True
        stopped = online("download", "z-image-turbo", cwd=tmp_path, **where)
        assert stopped.code == 2 and len(stopped.err.splitlines()) == 2, stopped.err
        assert "run it again when it can be: finished files are kept" in stopped.err
        finished = {name for name, _ in served.asked} - {WANTED[-1]}
        served.broken_at, served.for_good = 12_000_000, False
        served.asked.clear()
        ran = online("download", "z-image-turbo", "--json", cwd=tmp_path, **where)
        assert ran.code == 0, ran.err
        assert [first > 0 for name, first in served.asked if name == WANTED[-1]] == [False, True]
        assert finished and not finished & {name for name, _ in served.asked}
        (row,) = ran.json["models"]
        assert row["state"] == "here" and row["bytes"] >= len(WEIGHTS)
        assert snapshot_files(cache) == WANTED
        assert (Path(row["folder"]) / WANTED[-1]).read_bytes() == WEIGHTS
        before = len(served.asked)
        assert online("download", "z-image-turbo", cwd=tmp_path, **where).code == 0
        assert len(served.asked) == before, "nothing is fetched twice"
    listed = online("models", "--installed", "--json", cwd=tmp_path, HF_HUB_CACHE=str(cache)).json["models"]
    states = {row["name"]: row["state"] for row in listed}
    assert states["z-image-turbo"] == "here" and states["qwen-image-tiny"] == "packaged"
    assert "z-image" not in states
    asked = online("models", "z-image-turbo", "--remove", cwd=tmp_path, HF_HUB_CACHE=str(cache))
    assert asked.code == 2 and "nobody can answer here; add --yes" in asked.err and cache.is_dir()
    gone = online("models", "z-image-turbo", "--remove", "--yes", cwd=tmp_path, HF_HUB_CACHE=str(cache))
    assert gone.code == 0 and "MiB are free again" in gone.out
    assert not list(cache.glob("models--*/snapshots/*"))


def test_the_hub_that_cannot_be_reached_is_one_line(edit_bare, tmp_path):
    ran = edit_bare("download", "z-image-turbo", "-q", cwd=tmp_path)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert "cannot be reached (HF_HUB_OFFLINE is set); run it again when it can be" in ran.err


@pytest.mark.parametrize("columns", ["80", "140"])
def test_the_table_has_headings_and_fits(edit_bare, tmp_path, columns):
    ran = edit_bare("models", cwd=tmp_path, COLUMNS=columns)
    head, *lines = ran.out.split("\n\n")[0].splitlines()
    assert head.split() == ["name", "makes", "params", "GiB", "size", "steps", "licence", "where"]
    assert max(map(len, ran.out.splitlines())) <= max(int(columns), 84) and ran.imported is False
    starts = {line.split()[0]: line for line in lines}
    row = r"qwen-image-tiny \* +pictures +17.8 M +0.07 +128x128 +20 .*packaged"
    assert re.search(row, starts["qwen-image-tiny"])
    assert starts["hunyuan3d-2.1"].endswith("download") and "meshes" in starts["hunyuan3d-2.1"]
    assert [name for name in starts if f"{name} *" in starts[name]] == ["qwen-image-tiny", "hunyuan3d-tiny"]


def test_one_model_is_told_in_full(edit_bare, tmp_path):
    ran = edit_bare("models", "z-image", "hunyuan3d-tiny", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path))
    for words in (
        "edit generate -m Tongyi-MAI/Z-Image", "19.1 GiB", "size 1024x1024, steps 50",
        "edit download z-image",
        "edit generate-3d -m hunyuan3d-tiny", "128 cells",
    ):  # fmt: skip
        assert words in ran.out
    unknown = edit_bare("models", "z-imag", cwd=tmp_path)
    assert unknown.code == 2 and "did you mean z-image" in unknown.err


REFUSED = [
    (["--remove"], "--remove needs the name of a model"),
    (["--remove", "flux-tiny"], "is part of the package"),
    (["--remove", "z-image"], "nothing of it is in the local cache"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_removed(edit_bare, tmp_path, arguments, message):
    ran = edit_bare("models", *arguments, cwd=tmp_path, HF_HUB_CACHE=str(tmp_path))
    assert ran.code == 2 and message in ran.err and len(ran.err.splitlines()) == 1
