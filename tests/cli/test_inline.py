"""Pictures inside the terminal: what is written holds the picture, and only such terminals get it."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from edit_cli.generation.inline import CHUNK, iterm, kitty, protocol, sixel
from tests.conftest import EDIT, edit_environment

TERMINALS = [
    ({"TERM": "xterm-kitty"}, "kitty"),
    ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
    ({"TERM": "foot"}, "sixel"),
    ({"TERM": "xterm-256color"}, ""),
    ({"TERM": "xterm-kitty", "TMUX": "default,1,0"}, ""),
    ({}, ""),
]


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3), np.uint8)
    pixels[:20] = [255, 0, 0]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("environment", "how"), TERMINALS)
def test_terminals_are_known_by_their_environment(environment, how):
    assert protocol(environment, is_terminal=True) == how
    assert protocol(environment, is_terminal=False) == ""


def test_kitty_and_iterm_hold_the_picture(picture):
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(picture))
    assert len(chunks) > 1 and all(len(data) <= CHUNK for _, data in chunks)
    assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    for data in ("".join(data for _, data in chunks), iterm(picture).split(":", 1)[1].rstrip("\a")):
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.tobytes() == picture.tobytes()


def decoded(text: str) -> np.ndarray:
    """A picture from sixels: written anew from the protocol's description."""
    width, height = map(int, re.search(r'"1;1;(\d+);(\d+)', text).groups())
    pixels, palette = np.zeros((height + 6, width, 3)), {}
    x, top, colour = 0, 0, 0
    body = re.sub(r'^.*?"1;1;\d+;\d+', "", text).removesuffix("\x1b\\")
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+.|[?-~]|[$-]", body):
        if token.startswith("#"):
            number, *rest = token[1:].split(";")
            colour = int(number)
            if rest:
                palette[colour] = np.array(list(map(int, rest[1:]))) * 2.55
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            count, bits = (int(token[1:-1]), token[-1]) if token[0] == "!" else (1, token)
            for row in range(6):
                if (ord(bits) - 63) >> row & 1:
                    pixels[top + row, x : x + count] = palette[colour]
            x += count
    return pixels[:height]


def test_sixels_hold_the_picture(picture):
    few = np.asarray(picture.quantize(128).convert("RGB"), float)
    assert np.abs(decoded(sixel(picture)) - few).max() <= 2  # percent of 255, rounded


@pytest.mark.slow
def test_a_run_in_such_a_terminal_shows_its_picture(qwen_folder, tmp_path):
    ours, theirs = pty.openpty()
    command = [EDIT, "generate", "a cat", "-m", qwen_folder, "--steps", "2", "-o", "cat.png"]
    streams = {"stdout": theirs, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, env=edit_environment(TERM="xterm-kitty"), **streams)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0
    assert b"\x1b_Ga=T,f=100" in written and b"cat.png" in written
