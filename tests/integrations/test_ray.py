"""Tests for the batch embedder with every type of batch. Ray starts slowly; tests/examples/test_ray.py runs it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from embedonce import ConfigError, TextError
from embedonce_integrations.ray import BatchEmbedder
from embedonce_providers.ngram import NgramProvider

TEXTS = ["Green tea is steamed.", "Black tea is oxidised.", "Green tea is steamed."]
EXPECTED = NgramProvider(dimensions=64).embed(TEXTS, "document")


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    # This timeout is long enough for a busy machine.
    disk = {"type": "disk", "path": str(tmp_path / "vectors"), "write": "background", "timeout": "60s"}
    return {
        "provider": {"type": "ngram", "dimensions": 64},
        "tiers": [{"type": "memory"}, disk],
        "cache": {"flush_timeout": "60s"},
    }


def test_each_type_of_batch_is_returned_as_the_same_type(config: dict[str, Any]) -> None:
    embed = BatchEmbedder(config, sources="source")
    ids = [3, 1, 2]
    arrays = embed({"id": np.array(ids), "text": np.array(TEXTS)})
    assert arrays["embedding"].dtype == np.float32
    assert (arrays["embedding"] == EXPECTED).all()
    assert arrays["source"].tolist() == ["provider"] * 3
    table = embed(pa.table({"id": ids, "text": TEXTS}))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert (np.array(table["embedding"].to_pylist(), np.float32) == EXPECTED).all()
    frame = embed(pd.DataFrame({"id": ids, "text": TEXTS}, index=["x", "y", "z"]))
    assert (np.stack(list(frame["embedding"])) == EXPECTED).all()
    assert list(frame.index) == ["x", "y", "z"]
    series = embed(pd.Series(TEXTS, index=[5, 6, 7]))
    assert (np.stack(list(series)) == EXPECTED).all()
    assert list(series.index) == [5, 6, 7]
    for made in (table["source"].to_pylist(), list(frame["source"])):
        assert made == ["memory"] * 3
    for made, column in ((arrays, list(arrays["id"])), (table, table["id"].to_pylist()), (frame, list(frame["id"]))):
        assert column == ids, type(made)


def test_an_existing_column_is_replaced(config: dict[str, Any]) -> None:
    table = pa.table({"text": TEXTS, "embedding": [0, 0, 0]})
    assert BatchEmbedder(config)(table).column_names == ["text", "embedding"]


def test_an_empty_batch_gets_empty_columns(config: dict[str, Any]) -> None:
    embed = BatchEmbedder(config)
    assert embed({"text": np.array([], object)})["embedding"].shape == (0, 64)
    assert embed(pa.table({"text": pa.array([], pa.string())})).num_rows == 0
    assert len(embed(pd.DataFrame({"text": []}))) == 0


def test_a_returned_batch_is_stored(config: dict[str, Any]) -> None:
    embed = BatchEmbedder(config)
    embed({"text": np.array(TEXTS, object)})
    assert {held.tier: held.entries for held in embed.cache.contents()} == {"memory": 2, "disk": 2}


def test_a_failed_batch_names_the_text_and_keeps_the_others(config: dict[str, Any]) -> None:
    embed = BatchEmbedder(config)
    for value in (None, float("nan"), 5):
        with pytest.raises(TypeError, match="item 1"):
            embed(pd.DataFrame({"text": ["a", value]}))
    with pytest.raises(TextError, match="item 1"):
        embed({"text": np.array(["a", "\ud800"], object)})
    with pytest.raises(KeyError):
        embed({"words": np.array(["a"], object)})
    with pytest.raises(TypeError, match="a batch must be"):
        embed(5)


def test_only_the_arguments_are_pickled(config: dict[str, Any]) -> None:
    embed = BatchEmbedder(config, column="words", output="vector", task="query")
    assert embed.cache
    again = pickle.loads(pickle.dumps(embed))
    assert (again({"words": np.array(TEXTS)})["vector"] == EXPECTED).all()
    assert again.cache is embed.cache
    assert repr(again) == "<BatchEmbedder words -> vector>"


def test_dask_can_map_partitions_with_it(config: dict[str, Any]) -> None:
    dask = pytest.importorskip("dask.dataframe", reason="Dask is not installed: pip install 'dask[dataframe]'")
    frame = dask.from_pandas(pd.DataFrame({"text": TEXTS * 4}), npartitions=3)
    meta = pd.DataFrame({"text": pd.Series(dtype=object), "embedding": pd.Series(dtype=object)})
    made = frame.map_partitions(BatchEmbedder(config), meta=meta).compute(scheduler="threads")
    assert (np.stack(list(made["embedding"])) == np.tile(EXPECTED, (4, 1))).all()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_batch_embedder_that_has_been_used_can_be_copied(config: dict[str, Any], how: Any) -> None:
    embed = BatchEmbedder(config, sources="source")
    embed({"text": np.array(TEXTS, object)})
    again = how(embed)({"text": np.array(TEXTS, object)})
    assert (again["embedding"] == EXPECTED).all()
    assert set(again["source"]) == {"memory"}


def test_a_provider_that_ties_a_text_to_its_batch_is_refused(config: dict[str, Any]) -> None:
    provider = {"type": "openai", "model": "m", "api_key": "any", "extra_body": {"late_chunking": True}}
    with pytest.raises(ConfigError, match="late_chunking"):
        BatchEmbedder({**config, "provider": provider})({"text": np.array(TEXTS, object)})
