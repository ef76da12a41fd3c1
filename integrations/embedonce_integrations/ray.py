"""Ray Data: a batch embedder for ``map_batches``; the same callable serves Dask and Spark's pandas UDFs.

::

    dataset.map_batches(BatchEmbedder, fn_constructor_args=["embedonce.toml"], concurrency=2)

The cache is the checkpoint: what a batch has computed is written before the batch is handed on. A job that was
killed and is run again computes the rest, as long as its workers share a tier (disk on one machine, Redis or
Postgres beyond).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedonce import Cache
from embedonce.config import Source
from embedonce.contracts import Task

from .wrapping import shared_cache


class BatchEmbedder:
    """Embeds a column of texts, a batch at a time.

    It returns what it is given, with the column ``output`` added: a dict of numpy arrays (Ray's default), a
    ``pyarrow.Table`` or a pandas ``DataFrame``. For a pandas ``Series``, as in a UDF, it is a ``Series`` of arrays.
    It is pickled as its arguments, and opens its cache where it is called: every process has one, which all batch
    embedders of equal configuration share.

    Args:
        config: what :func:`embedonce.open` takes. A path must be right on every machine.
        column: the texts.
        output: the column for the vectors: float32, shape (n, d) in numpy, a list of d values elsewhere.
        sources: a column that says where each vector came from: a tier's name, or ``"provider"``; None for no such
            column.
        task: what the texts are embedded for.
    """

    def __init__(
        self,
        config: Source = None,
        *,
        column: str = "text",
        output: str = "embedding",
        sources: str | None = None,
        task: Task = "document",
    ) -> None:
        self._arguments: dict[str, Any] = {
            "config": config,
            "column": column,
            "output": output,
            "sources": sources,
            "task": task,
        }

    @cached_property
    def cache(self) -> Cache:
        """The cache of this process."""
        return shared_cache(self._arguments["config"])

    def __call__(self, batch: Any) -> Any:
        """Return the batch with its vectors.

        Raises:
            KeyError: the batch has no such column.
            TypeError: a value of the column is no text, by position; or the batch is of another kind.
            Exception: whatever the provider raised. What it had computed by then is stored.
        """
        column, output, sources = (self._arguments[name] for name in ("column", "output", "sources"))
        kind = type(batch).__name__
        if kind == "Series":
            vectors, _ = self._embed(batch.tolist())
            return type(batch)(list(vectors), index=batch.index, name=output, dtype=object)
        try:
            texts = batch[column]
        except TypeError:
            raise TypeError(
                f"a batch is a dict of numpy arrays, a pyarrow Table, a pandas DataFrame or a Series, not {kind}"
            ) from None
        vectors, found = self._embed(texts.to_pylist() if kind == "Table" else list(texts))
        more = {output: vectors} if sources is None else {output: vectors, sources: np.array(found, object)}
        if kind == "Table":
            return _with_columns(batch, more)
        if isinstance(batch, Mapping):
            return {**batch, **more}
        return batch.assign(**{name: list(values) for name, values in more.items()})

    def _embed(self, texts: list[Any]) -> tuple[NDArray[np.float32], list[str | None]]:
        try:
            fetched = self.cache.fetch(texts, task=self._arguments["task"])
        finally:
            self.cache.flush()  # what a batch has computed is stored before the batch is handed on
        for error in fetched.failed.values():
            raise error
        return fetched.vectors, list(fetched.sources)

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments}

    def __repr__(self) -> str:
        return f"<BatchEmbedder {self._arguments['column']} -> {self._arguments['output']}>"


def _with_columns(table: Any, columns: Mapping[str, NDArray[Any]]) -> Any:
    """Return a pyarrow table with columns added or, where it has them, replaced."""
    import pyarrow as pa  # type: ignore[import-untyped]

    for name, values in columns.items():
        if values.ndim == 2:
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        else:
            column = pa.array(values)
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table
