"""Shared fixtures: tiny random pipelines built once per session, and `edit` as users run it."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fresh import TORCH, Ran, Server

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores; read by torch

EDIT = Path(sys.executable).with_name("edit")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def edit_environment(**extra: str) -> dict[str, str]:
    """Environment of a subprocess: no network, one thread, plain wide output."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("EDIT_", "HF_"))}
    plain = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    return {**keep, **plain, **extra}


@pytest.fixture(scope="session")
def edit() -> Iterator[Server]:
    """`edit(*arguments, cwd=folder)` -> Ran, in a process of its own."""
    server = Server(edit_environment(), TORCH)
    yield server
    server.close()


@pytest.fixture(scope="session")
def edit_bare() -> Iterator[Server]:
    """Like `edit`, in a process that starts without torch; `Ran.imported` says whether it ends with it."""
    server = Server(edit_environment())
    yield server
    server.close()


@pytest.fixture(scope="session")
def edit_here() -> Callable[..., Ran]:
    """Like `edit`, but in this process: saves importing torch again where a fresh process proves nothing."""
    from rich.console import Console

    from edit_cli import console
    from edit_cli.main import main

    def run(*arguments: object, cwd: Path, stdin: str | None = None) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(os, "environ", edit_environment())
            patch.setattr(Console, "_environ", os.environ)  # rich remembers the one it was imported with
            for name, stream in (("stdout", out), ("stderr", err)):
                patch.setattr(sys, name, stream)
            if stdin is not None:
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            console.stdout.cache_clear()  # consoles remember the streams and the width they were made for
            console.stderr.cache_clear()
            try:
                with pytest.raises(SystemExit) as exit_info:
                    main([str(argument) for argument in arguments])
            finally:
                console.stdout.cache_clear()
                console.stderr.cache_clear()
        return Ran(int(exit_info.value.code or 0), out.getvalue(), err.getvalue())

    return run


def _once(tmp_path_factory, name: str, build) -> Path:
    """Build a folder once for all xdist workers."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder, lock = root / name, root / f"{name}.lock"
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        import time

        while not (root / f"{name}.done").exists():
            time.sleep(0.2)
        return folder
    build(folder)
    (root / f"{name}.done").touch()
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory) -> Path:
    """A random QwenImagePipeline folder with its own bundle in `routers/` (recommends 0.8)."""
    from backbones import qwen_image
    from tests.tiny_pipelines import make_bundle, make_qwen_image

    def build(folder: Path) -> None:
        make_qwen_image(folder)
        make_bundle(folder / "routers", folder, qwen_image.TRANSFORMER)

    return _once(tmp_path_factory, "tiny-qwen", build)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory) -> Path:
    """A random FluxPipeline folder with its own bundle in `routers/`."""
    from backbones import flux
    from tests.tiny_pipelines import make_bundle, make_flux

    def build(folder: Path) -> None:
        make_flux(folder)
        make_bundle(folder / "routers", folder, flux.TRANSFORMER, steps=2)

    return _once(tmp_path_factory, "tiny-flux", build)


@pytest.fixture(scope="session")
def mesh_folder(tmp_path_factory) -> Path:
    """A random Hunyuan3D 2 folder with its own bundle in `routers/` (recommends 0.8)."""
    from tests.hunyuan3d_tiny import save_folder

    return _once(tmp_path_factory, "tiny-mesh", save_folder)
