"""Imported by a server of commands: one with KILL_AT=k in its environment dies before its k-th rename."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from routers import files

count = 0


def deadly(rename: Callable[..., Any]) -> Callable[..., Any]:
    """A rename that is counted where it is in the working folder, and may be the last thing done."""

    def counted(source: Any, target: Any, **more: Any) -> Any:
        global count
        if os.path.abspath(target).startswith(os.getcwd()):
            count += 1
            if count == int(os.environ.get("KILL_AT", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, **more)

    return counted


os.rename, os.replace, files.exchange = deadly(os.rename), deadly(os.replace), deadly(files.exchange)
