"""Fresh processes of `edit` without the seconds of importing torch again: forks of one that has imported it.

The server imports once and then forks for every command. A fork has nothing of an earlier command in it, can
be interrupted and killed, and ends as the console script does. The console script itself is run by
`test_cli_bad_input.py`, `test_package.py` and the README's tour.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300  # s; a loaded machine is slow
TORCH = (
    "diffusers.pipelines.qwenimage.pipeline_qwenimage", "peft.tuners", "edit_cli.generation.session",
    "edit_cli.generation.mesh", "backbones.loading", "backbones.hunyuan3d.checkpoints", "routers.bundle",
)  # fmt: skip
"""What commands that run a model import."""


@dataclass
class Ran:
    """A finished command. imported: whether it had torch in it, where that was watched."""

    code: int
    out: str
    err: str
    imported: bool | None = None

    @property
    def said(self) -> list[str]:
        """Lines of stderr but those on how far the run is, which may have begun before an error."""
        return [line for line in self.err.splitlines() if not line.startswith("[")]

    @property
    def json(self) -> dict:
        """The last line of stdout, parsed."""
        return json.loads(self.out.splitlines()[-1])


class Running:
    """A command under way."""

    def __init__(self, replies: Replies, folder: tempfile.TemporaryDirectory) -> None:
        self._replies, self._folder = replies, folder
        self.pid = int(replies.line(TIMEOUT))
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs; negative for a signal."""
        if self._code is None and self._replies.ready(0):
            self._code = int(self._replies.line(0))
        return self._code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ran:
        """What it printed."""
        if self._code is None:
            try:
                self._code = int(self._replies.line(TIMEOUT))
            except TimeoutError:
                self.send_signal(signal.SIGKILL)
                raise
        files = [Path(self._folder.name, name) for name in ("out", "err", "imported")]
        out, err, imported = (file.read_text() if file.exists() else "" for file in files)
        self._folder.cleanup()
        return Ran(self._code, out, err, imported == "True")


class Replies:
    """Lines of a server's output."""

    def __init__(self, stream: object) -> None:
        self._stream, self._selector = stream, selectors.DefaultSelector()
        self._selector.register(stream, selectors.EVENT_READ)

    def ready(self, seconds: float) -> bool:
        return bool(self._selector.select(seconds))

    def line(self, seconds: float) -> bytes:
        if not self.ready(seconds):
            raise TimeoutError(f"no answer in {seconds} s")
        text = b""
        while not text.endswith(b"\n"):  # unbuffered: nothing of the next line is taken
            part = os.read(self._stream.fileno(), 1)
            assert part, "the server ended"
            text += part
        return text


class Server:
    """One process that forks itself for every command, one at a time. preload: modules it imports first."""

    def __init__(self, environment: dict[str, str], preload: Sequence[str] = ()) -> None:
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fresh", *preload], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, cwd=Path(__file__).parents[1], env=environment, start_new_session=True,
        )  # fmt: skip
        self._replies = Replies(self._process.stdout)

    def start(self, *arguments: object, cwd: Path, stdin: str = "", **environment: str) -> Running:
        """Begin a command."""
        folder = tempfile.TemporaryDirectory()
        Path(folder.name, "in").write_text(stdin, errors="surrogateescape")
        job = {
            "arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "folder": folder.name,
            "environment": {**self.environment, **environment},
        }  # fmt: skip
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return Running(self._replies, folder)

    def __call__(self, *arguments: object, cwd: Path, stdin: str = "", **environment: str) -> Ran:
        """A command from start to end."""
        return self.start(*arguments, cwd=cwd, stdin=stdin, **environment).wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(TIMEOUT)


def become(job: dict) -> None:
    """Turn a fork into the process that a shell would have started."""
    folder = Path(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    for number, name in enumerate(("in", "out", "err")):
        file = os.open(folder / name, os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    sys.argv = ["edit", *job["arguments"]]
    atexit.register(lambda: (folder / "imported").write_text(str("torch" in sys.modules)))


def serve() -> None:
    """Read a job a line; answer with the fork's process id, then with its exit code."""
    from edit_cli import console
    from edit_cli.main import main

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
        main(["generate", "a cat", "--budget", "0"])  # imports what every command parses and prints with
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    for module in sys.argv[1:]:
        __import__(module)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
            main()
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
