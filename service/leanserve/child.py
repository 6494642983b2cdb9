"""How a child process of this service is started: the command, and the child's first steps.

``python -m`` would put the working directory first on the path, where a user's folder `leanserve/` takes the
place of ours and a file `queue.py` that of Python's own. So this file is run by its path, which `-P` keeps off the path
of imports; it binds the names of our packages to the installation that it lies in, and then runs the module.

On Linux the kernel kills a child whose parent is gone, however that ended: nobody would wait for it any more. That may
happen at any moment of a build, which leaves nothing half-written behind.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve()
ROOTS = (HERE.parents[1], HERE.parents[2] / "models")
"""The folders of our packages: site-packages, or those of a source tree."""
PACKAGES = ("leanserve", "leanserve_models")
_PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation, as ``python -m module arguments`` would without a path."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), str(os.getpid()), module, *arguments]


def how_it_ended(status: int) -> str:
    """What the exit status of a child tells, for the error that names the child."""
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL), as the kernel does when memory runs out"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def main(parent: str, module: str, *arguments: str) -> None:
    """The child of the process `parent`, from its start to the end of the module."""
    _end_with(int(parent))
    faulthandler.enable()  # the last words of what crashes in a native library
    for name in PACKAGES:
        _bind(name)
    from leanserve.privacy import send_nothing

    send_nothing()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)


def _bind(name: str) -> None:
    """Import a package of ours from where it lies, whatever else of that name is on the path."""
    spec = PathFinder.find_spec(name, list(map(str, ROOTS)))
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
