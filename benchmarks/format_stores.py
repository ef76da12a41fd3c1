"""The formats that bundle_formats.py compares: Arrow, Parquet and Lance files beside LMDB.

Every store is written from blocks that are sorted by key, and reads with nothing but the library of its format. A read
returns a matrix of shape (n, d) in the order of the keys, and checks that the keys of the rows are those it looked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

KEY_BYTES = 85
"""Length of a key: ``eo1.<16 hex digits>.<64 hex digits>``."""
START = 21
"""Where the hex digits of the digest begin in a key."""


class Block(NamedTuple):
    """Rows in the order of their keys."""

    keys: list[str]
    vectors: Any
    """Float32, shape (n, d)."""
    created: Any
    """Float64, shape (n,)."""


def parse_prefixes(keys: Sequence[str]) -> Any:
    """Return the first eight bytes of each digest as a big-endian integer: uint64, shape (n,)."""
    digits = "".join([key[START : START + 16] for key in keys])
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)


def make_table(block: Block) -> Any:
    """Return the columns ``key``, ``prefix``, ``vector``, ``created`` and ``checksum`` as a table of Arrow."""
    import pyarrow
    import xxhash

    dimensions = block.vectors.shape[1]
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.vectors.reshape(-1)), dimensions)
    checksums = np.array([xxhash.xxh3_64_intdigest(row) for row in block.vectors], np.uint64)
    return pyarrow.table(
        {
            "key": block.keys,
            "prefix": parse_prefixes(block.keys),
            "vector": vectors,
            "created": block.created,
            "checksum": checksums,
        }
    )


def find_rows(prefixes: Any, keys: Sequence[str]) -> Any:
    """Return the row of each key in a sorted column of prefixes: int64, shape (n,)."""
    wanted = parse_prefixes(keys)
    # Sorted searches touch the column in order, which saves half of the time if it is larger than the caches.
    order = wanted.argsort()
    rows = np.empty(len(keys), np.int64)
    rows[order] = np.searchsorted(prefixes, wanted[order])
    return rows


def get_matrix(column: Any) -> Any:
    """Return a fixed-size list column without nulls as a view of shape (n, d)."""
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)


def check_keys(found: str | list[str], keys: str | list[str]) -> None:
    if found != keys:
        raise RuntimeError("rows of other keys were read")


class Store:
    """A format under test."""

    name: ClassVar[str]
    path: ClassVar[str]
    """Name of the store's file or folder. Stores with the same path read the same files."""
    requires: ClassVar[str] = "pyarrow"
    """The module that the store requires."""
    kind: ClassVar[Literal["lmdb", "arrow", "parquet", "lance"]]

    def __init__(self, folder: Path) -> None:
        self.target = folder / self.path

    @classmethod
    def import_library(cls) -> None:
        """Import what reading needs, so that opening is timed without it."""
        import pyarrow  # noqa: F401

    def write(self, blocks: Iterator[Block]) -> None:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def get_many(self, keys: list[str]) -> Any:
        raise NotImplementedError

    def get(self, key: str) -> Any:
        return self.get_many([key])[0]

    def close(self) -> None:
        """Release the files."""

    def count_bytes(self) -> int:
        files = [self.target] if self.target.is_file() else [file for file in self.target.rglob("*") if file.is_file()]
        return sum(min(file.stat().st_size, file.stat().st_blocks * 512) for file in files)

    def remove(self) -> None:
        shutil.rmtree(self.target) if self.target.is_dir() else self.target.unlink(missing_ok=True)


class Lmdb(Store):
    """The floor: one transaction, and one getmulti per batch. The keys are the 32 bytes of the digests."""

    name = "LMDB, `getmulti` and a matrix"
    path = "lmdb"
    kind = "lmdb"
    requires = "lmdb"

    @classmethod
    def import_library(cls) -> None:
        import lmdb  # noqa: F401

    def write(self, blocks: Iterator[Block]) -> None:
        import lmdb

        with lmdb.open(str(self.target), map_size=2**40, sync=False, metasync=False) as handle:
            for block in blocks:
                pairs = [(bytes.fromhex(key[START:]), row.tobytes()) for key, row in zip(*block[:2], strict=True)]
                with handle.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti(pairs, append=True)
            handle.sync(True)

    def open(self) -> None:
        import lmdb

        self.handle = lmdb.open(str(self.target), map_size=2**40, readonly=True, lock=False, readahead=False)

    def read_values(self, keys: Sequence[str]) -> list[tuple[bytes, bytes]]:
        names = [bytes.fromhex(key[START:]) for key in keys]
        with self.handle.begin() as transaction, transaction.cursor() as cursor:
            return list(cursor.getmulti(names))

    def get_many(self, keys: list[str]) -> Any:
        found = self.read_values(keys)
        if len(found) != len(keys):
            raise RuntimeError("keys are missing")
        return np.frombuffer(b"".join([value for _, value in found]), np.float32).reshape(len(keys), -1)

    def get(self, key: str) -> Any:
        with self.handle.begin() as transaction:
            return np.frombuffer(transaction.get(bytes.fromhex(key[START:])), np.float32)

    def close(self) -> None:
        self.handle.close()


class LmdbValues(Lmdb):
    name = "LMDB, `getmulti` alone"
    path = "lmdb-values"  # a process can open a folder of LMDB only once

    def get_many(self, keys: list[str]) -> Any:
        return self.read_values(keys)

    def get(self, key: str) -> Any:
        with self.handle.begin() as transaction:
            return transaction.get(bytes.fromhex(key[START:]))


class Arrow(Store):
    """An Arrow IPC file with one record batch, mapped into memory. The rows are found with the column ``prefix``."""

    name = "Arrow, mapped"
    path = "arrow"
    kind = "arrow"
    verifies: ClassVar[bool] = False

    @classmethod
    def import_library(cls) -> None:
        import pyarrow.ipc  # noqa: F401
        import xxhash  # noqa: F401

    def write(self, blocks: Iterator[Block]) -> None:
        import pyarrow
        import pyarrow.ipc

        # The benchmark holds the rows of one part in memory, because a file with one record batch is easy to search.
        table = pyarrow.concat_tables([make_table(block) for block in blocks]).combine_chunks()
        with pyarrow.ipc.new_file(self.target, table.schema) as file:
            file.write_table(table)

    def open(self) -> None:
        import pyarrow.ipc

        batch = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.target))).get_batch(0)
        # The buffers, because the first call of Array.to_numpy() imports pandas, which takes longer than opening.
        self.prefixes, self.checksums = (
            np.frombuffer(batch.column(name).buffers()[1], np.uint64, len(batch)) for name in ("prefix", "checksum")
        )
        self.vectors = np.frombuffer(batch.column("vector").buffers()[2], np.float32).reshape(len(batch), -1)
        self.keys = np.frombuffer(batch.column("key").buffers()[2], f"V{KEY_BYTES}", len(batch))

    def get_many(self, keys: list[str]) -> Any:
        rows = find_rows(self.prefixes, keys)
        check_keys(self.keys.take(rows).tobytes().decode(), "".join(keys))
        vectors = self.vectors.take(rows, 0)
        if self.verifies:
            self.verify(vectors, rows)
        return vectors

    def verify(self, vectors: Any, rows: Any) -> None:
        from xxhash import xxh3_64_intdigest

        if list(map(xxh3_64_intdigest, vectors)) != self.checksums[rows].tolist():
            raise RuntimeError("a row is damaged")

    def get(self, key: str) -> Any:
        row = int(self.prefixes.searchsorted(np.uint64(int(key[START : START + 16], 16))))
        check_keys(self.keys[row].tobytes().decode(), key)
        vector = self.vectors[row].copy()
        if self.verifies:
            self.verify(vector[None], np.array([row]))
        return vector


class ArrowVerified(Arrow):
    name = "Arrow, mapped, with a checksum per row"
    verifies = True


class _Parquet(Store):
    """A Parquet file. The statistics of its footer tell which row groups have a key; these are read and searched."""

    kind = "parquet"
    rows_per_group: ClassVar[int]
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def import_library(cls) -> None:
        import pandas  # noqa: F401
        import pyarrow.parquet  # noqa: F401

    def write(self, blocks: Iterator[Block]) -> None:
        import pyarrow
        import pyarrow.parquet

        # Neither hashes nor random vectors repeat, so a dictionary would only cost time.
        options = {"compression": "none", "use_dictionary": False, "write_page_index": True, **self.options}
        writer, kept = None, []
        for block in blocks:
            kept.append(make_table(block))
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(self.target, kept[0].schema, **options)
            if sum(table.num_rows for table in kept) >= self.rows_per_group:
                writer.write_table(pyarrow.concat_tables(kept), row_group_size=self.rows_per_group)
                kept = []
        if writer is not None:
            if kept:
                writer.write_table(pyarrow.concat_tables(kept), row_group_size=self.rows_per_group)
            writer.close()

    def open(self) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(self.target, memory_map=True)
        footer = self.file.metadata
        column = self.file.schema_arrow.names.index("prefix")
        lasts = [footer.row_group(at).column(column).statistics.max for at in range(footer.num_row_groups)]
        self.lasts = np.array(lasts, np.uint64)

    def get_many(self, keys: list[str]) -> Any:
        groups = np.unique(find_rows(self.lasts, keys)).tolist()
        table = self.file.read_row_groups(groups, columns=["key", "prefix", "vector"]).combine_chunks()
        rows = find_rows(table.column("prefix").to_numpy(), keys)
        check_keys(table.column("key").take(rows).to_pylist(), keys)
        return get_matrix(table.column("vector").chunk(0))[rows]

    def close(self) -> None:
        self.file.close()


class Parquet128(_Parquet):
    name = "Parquet, row groups of 128"
    path = "small.parquet"
    rows_per_group = 128


class Parquet1024(_Parquet):
    name = "Parquet, row groups of 1,024"
    path = "medium.parquet"
    rows_per_group = 1024


class Parquet16384(_Parquet):
    name = "Parquet, row groups of 16,384"
    path = "large.parquet"
    rows_per_group = 16_384


class ParquetZstd(_Parquet):
    name = "Parquet, row groups of 1,024, zstd"
    path = "zstd.parquet"
    rows_per_group = 1024
    options: ClassVar = {"compression": "zstd"}


class ParquetDuckDb(_Parquet):
    """DuckDB uses the statistics and the Bloom filters of the file."""

    name = "Parquet, row groups of 16,384, Bloom filter, read by DuckDB"
    path = "bloom.parquet"
    requires = "duckdb"
    rows_per_group = 16_384
    options: ClassVar = {"bloom_filter_options": {"prefix": {"ndv": 16_384, "fpp": 0.01}}}

    @classmethod
    def import_library(cls) -> None:
        import duckdb  # noqa: F401
        import pandas  # noqa: F401

    def open(self) -> None:
        import duckdb

        self.connection: Any = duckdb.connect()
        self.connection.execute(f"CREATE VIEW bundle AS SELECT * FROM read_parquet('{self.target}')")

    def get_many(self, keys: list[str]) -> Any:
        wanted = parse_prefixes(keys).tolist()
        query = f"SELECT key, vector FROM bundle WHERE prefix IN ({', '.join(map(str, wanted))})"
        table = self.connection.sql(query).to_arrow_table().combine_chunks()
        places = {key: at for at, key in enumerate(table.column("key").to_pylist())}
        values = table.column("vector").chunk(0).flatten().to_numpy().reshape(table.num_rows, -1)
        return values[[places[key] for key in keys]]

    def close(self) -> None:
        self.connection.close()


class LanceTake(Store):
    """A Lance data set. The column ``prefix`` is read into memory at opening, and the rows are taken by number."""

    name = "Lance, `take` of the rows that the prefixes have"
    path = "lance"
    requires = "lance"
    kind = "lance"

    @classmethod
    def import_library(cls) -> None:
        import lance  # noqa: F401
        import pandas  # noqa: F401

    def write(self, blocks: Iterator[Block]) -> None:
        import lance
        import pyarrow

        first = make_table(next(blocks))

        def make_batches() -> Iterator[Any]:
            yield from first.to_batches()
            for block in blocks:
                yield from make_table(block).to_batches()

        reader = pyarrow.RecordBatchReader.from_batches(first.schema, make_batches())
        data = lance.write_dataset(reader, self.target)
        data.create_scalar_index("key", "BTREE")

    def open(self) -> None:
        import lance

        self.data: Any = lance.dataset(self.target)
        self.prefixes = self.data.to_table(columns=["prefix"]).column("prefix").to_numpy()

    def get_many(self, keys: list[str]) -> Any:
        table = self.data.take(find_rows(self.prefixes, keys).tolist(), columns=["key", "vector"])
        check_keys(table.column("key").to_pylist(), keys)
        return get_matrix(table.combine_chunks().column("vector").chunk(0))


class LanceIndex(LanceTake):
    """The same data set. Its index on the keys finds the rows."""

    name = "Lance, filter with the BTREE index on the key"

    def open(self) -> None:
        import lance

        self.data = lance.dataset(self.target)

    def get_many(self, keys: list[str]) -> Any:
        quoted = ", ".join([f"'{key}'" for key in keys])
        table = self.data.to_table(columns=["key", "vector"], filter=f"key IN ({quoted})").combine_chunks()
        places = {key: at for at, key in enumerate(table.column("key").to_pylist())}
        return get_matrix(table.column("vector").chunk(0))[[places[key] for key in keys]]


STORES: Sequence[type[Store]] = (
    Lmdb,
    LmdbValues,
    Arrow,
    ArrowVerified,
    Parquet128,
    Parquet1024,
    Parquet16384,
    ParquetZstd,
    ParquetDuckDb,
    LanceTake,
    LanceIndex,
)
"""The floor is the first one."""
