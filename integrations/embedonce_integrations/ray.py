"""Ray Data: a batch embedder for ``map_batches``. The same callable works in Dask and in Spark's pandas UDFs.

::

    dataset.map_batches(BatchEmbedder, fn_constructor_args=["embedonce.toml"], concurrency=2)

The cache serves as the checkpoint, because the vectors of a batch are written before the batch is returned. If a job is
killed and run again, it embeds only the remaining texts, as long as its workers share a tier (disk on one machine,
Redis or Postgres on several).
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
from embedonce.vectors import Matrix

from .wrapping import open_shared_cache


class BatchEmbedder:
    """Embeds a column of texts, a batch at a time.

    A call returns the batch with the column ``output`` added. A batch is a dict of numpy arrays (Ray's default), a
    ``pyarrow.Table`` or a pandas ``DataFrame``. For a pandas ``Series``, as in a UDF, the result is a ``Series`` of
    arrays. Pickling a batch embedder keeps only its arguments. Each process opens its own cache at the first call, and
    all batch embedders with equal configurations share it.

    Args:
        config: anything that :func:`embedonce.open` accepts. A path must be valid on every machine.
        column: name of the column with the texts.
        output: name of the column for the vectors, which are float32. In a dict of numpy arrays, the column has shape
            (n, d). In a table or a DataFrame, each value of the column holds d numbers.
        sources: name of a column for the source of each vector (a tier's name or ``"provider"``); None to add no column
            for the sources.
        task: task that the texts are embedded for.
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
        return open_shared_cache(self._arguments["config"])

    def __call__(self, batch: Any) -> Any:
        """Return the batch with its vectors.

        Raises:
            KeyError: the batch has no column with the name that the argument ``column`` gives.
            TypeError: a value of the column is not a text (the message names the position of the value), or the type of
                the batch is not supported.
            Exception: the provider's own error. Vectors that were computed before the exception are stored.
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
                "a batch must be a dict of numpy arrays, a pyarrow Table, a pandas DataFrame or a pandas Series, "
                f"got {kind}"
            ) from None
        vectors, origins = self._embed(texts.to_pylist() if kind == "Table" else list(texts))
        columns = {output: vectors} if sources is None else {output: vectors, sources: np.array(origins, object)}
        if kind == "Table":
            return _set_columns(batch, columns)
        if isinstance(batch, Mapping):
            return {**batch, **columns}
        return batch.assign(**{name: list(values) for name, values in columns.items()})

    def _embed(self, texts: list[Any]) -> tuple[Matrix, list[str | None]]:
        try:
            fetched = self.cache.fetch(texts, task=self._arguments["task"])
        finally:
            self.cache.flush()  # the vectors of a batch must be stored before the batch is returned
        for error in fetched.failed.values():
            raise error
        return fetched.vectors, list(fetched.sources)

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments}

    def __repr__(self) -> str:
        return f"<BatchEmbedder {self._arguments['column']} -> {self._arguments['output']}>"


def _set_columns(table: Any, columns: Mapping[str, NDArray[Any]]) -> Any:
    """Return a pyarrow table with the columns added. Columns that the table already has are replaced."""
    import pyarrow as pa  # type: ignore[import-untyped]

    for name, values in columns.items():
        if values.ndim == 2:
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        else:
            column = pa.array(values)
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table
