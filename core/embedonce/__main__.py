"""Run the command ``embedonce`` as ``python -m embedonce``."""

from __future__ import annotations

from embedonce.cli import main

if __name__ == "__main__":
    main()
