"""The command `polyckpt`. Exit codes: 0 for yes, 1 for no (damaged, different, nothing found), 2 where it could not be told."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from typing import Any


def main() -> None:
    """Run the command line; it needs the extra "cli"."""
    try:
        from polyckpt.cli import convert  # noqa: F401, which adds its command
        from polyckpt.cli.commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        raise SystemExit(f"polyckpt: the command line needs {error.name}: pip install 'polyckpt[cli]'") from error
    from polyckpt.errors import PolyckptError

    debug = "--debug" in sys.argv
    sys.argv = [each for each in sys.argv if each != "--debug"]  # wherever it stands
    if not debug:
        warnings.showwarning = _warn
    try:
        app()
    except (PolyckptError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(0) from error
        if debug:
            raise
        sys.stderr.write(f"polyckpt: {error}\n")
        raise SystemExit(2) from error
    finally:
        gc.freeze()  # all goes with the process; to look through it once more takes as long as to list a run


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"polyckpt: warning: {message}\n")
