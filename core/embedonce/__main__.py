"""Run the command ``embedonce`` as ``python -m embedonce``."""

from __future__ import annotations

import os
import sys


def _leave_current_folder() -> None:
    """Remove the current folder from the path, where ``python -m`` puts it.

    A package in the current folder could otherwise register itself as a plugin. The command ``embedonce`` does not look
    there either.
    """
    try:
        here = os.getcwd()
    except OSError:  # the folder was removed
        return
    if not sys.flags.safe_path and sys.path[:1] in ([""], [here]):
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_folder()

    from embedonce.cli import main

    main()
