"""The ``llama-index`` importer: the embeddings cache of LlamaIndex in a JSON file.

LlamaIndex's ``embeddings_cache=SimpleKVStore()``, after ``persist``, is one JSON file. It holds all collections of the
store: ``{"embeddings": {text: {uuid: [numbers]}}}``. The file does not say which model made the vectors.
"""

from __future__ import annotations

import io
import os
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._json_stores import MAX_PIECE, JsonReader, JsonStore, decode_string
from ._llama_index import UNKNOWN_LINE_BREAKS, LineBreaks, check_line_breaks, decode_entry, find_embedded_text
from ._values import DecodedVector

api = 1

PART: Final = 1024
"""Number of texts that a scan yields at once."""


class LlamaIndexImporter:
    """Finds vectors in a JSON file of LlamaIndex's SimpleKVStore.

    A scan reads the file once, in pieces. The first lookup reads it as well, and remembers 24 bytes per text: a hash,
    and where the entry begins and ends. Each process that looks texts up does this again, and also after the file has
    changed. It takes about a second per gigabyte.
    """

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("The JSON file that SimpleKVStore.persist has written.")],
        collection: Annotated[
            str, Doc("Collection of the store. LlamaIndex always calls it embeddings.")
        ] = "embeddings",
        line_breaks: LineBreaks = None,
    ) -> None:
        check_line_breaks(line_breaks)
        self._store = JsonStore(Path(path), collection, example="embeddings_cache.persist(…)")
        self._line_breaks = line_breaks
        self._index: _Index | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.source = Source(
            f"llama-index: {path}, collection={collection}, line_breaks={line_breaks}",
            mixing="LlamaIndex stores the vectors of queries and of documents under the same key, which is the text",
        )

    def check(self) -> None:
        """Read the file up to the first entry of the collection.

        Raises:
            SourceError: the file cannot be read, is not a store of LlamaIndex, or does not have the collection.
        """
        with self._store.open() as (_, entries):
            for _, reader in entries:
                raw = reader.read()
                try:
                    decode_entry(raw)
                except ValueError as error:
                    raise SourceError(
                        f"{self._store.path}: collection {self._store.collection!r} has something other than "
                        f"embeddings ({error}); set collection to the one that has them, which LlamaIndex calls "
                        "'embeddings'. An ingestion cache has the importer llama-index-ingestion"
                    ) from None
                return

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the file has.

        Raises:
            SourceError: the file cannot be read, or another thread is still reading it for the first time.
        """
        found: list[str] = []
        vectors: list[DecodedVector] = []
        unreadable: dict[str, int] = {}
        with self._store.open_file() as file:
            index = self._read_index(file)
            for text in texts:
                try:
                    vector = self._find(file, index, text)
                except ValueError as error:
                    unreadable[str(error)] = unreadable.get(str(error), 0) + 1
                    continue
                if vector is not None:
                    found.append(text)
                    vectors.append(vector)
            self._store.check_unchanged(file, index.version)
        return FoundVectors(found, vectors, unreadable)

    def scan(self) -> Iterator[FoundVectors]:
        """Yield all texts of the collection.

        Raises:
            SourceError: the file cannot be read, is not a store of LlamaIndex, or has changed meanwhile.
        """
        found: list[str] = []
        vectors: list[DecodedVector] = []
        unreadable: dict[str, int] = {}
        with self._store.open() as (check_unchanged, entries):
            for key, reader in entries:
                raw = reader.read()
                try:
                    text = find_embedded_text(decode_string(key), self._line_breaks)
                    if text is None:
                        raise ValueError(UNKNOWN_LINE_BREAKS)
                    vectors.append(decode_entry(raw))
                    found.append(text)
                except ValueError as error:
                    unreadable[str(error)] = unreadable.get(str(error), 0) + 1
                if len(found) + sum(unreadable.values()) >= PART:
                    check_unchanged()
                    yield FoundVectors(found, vectors, unreadable)
                    found, vectors, unreadable = [], [], {}
            check_unchanged()
        if found or unreadable:
            yield FoundVectors(found, vectors, unreadable)

    def count(self) -> int | None:
        """Return the number of texts if a lookup has counted them already."""
        index = self._index
        return None if index is None else len(index.hashes)

    def close(self) -> None:
        """Forget the index. No file stays open between two calls."""
        self._index = None

    def _read_index(self, file: BinaryIO) -> _Index:
        """Return the index of the file as it is now. One thread makes it, and the others wait for it."""
        version = self._store.get_version(file)
        if self._pid != os.getpid():  # at the fork, a thread of the parent may have held the lock
            self._lock, self._pid = threading.Lock(), os.getpid()
        seconds = time_left()
        if not self._lock.acquire(timeout=-1 if seconds is None else max(0.0, seconds)):
            raise SourceError(
                f"{self._store.path} is still being read for the first lookup, which takes about a second per "
                "gigabyte; import the whole file with `embedonce import` instead"
            )
        try:
            if self._index is None or self._index.version != version:
                self._index = _Index(self._store, self._line_breaks, version)
            return self._index
        finally:
            self._lock.release()

    def _find(self, file: BinaryIO, index: _Index, text: str) -> DecodedVector | None:
        """Return the vector of a text; None if the file does not have the text.

        Raises:
            ValueError: the file has it, but its vector cannot be used. The message is a short reason.
        """
        for begin, end in index.find(text):
            if end - begin > MAX_PIECE:
                raise ValueError(f"larger than {MAX_PIECE >> 20} MiB")
            file.seek(begin)
            raw = file.read(end - begin)
            # Two texts may have the same hash.
            reader = JsonReader(io.BytesIO(b"{" + raw + b"}"))
            key = next(reader.members())
            stored = find_embedded_text(decode_string(key), self._line_breaks)
            if stored == text:
                return decode_entry(reader.read())
            if stored is None and decode_string(key) == text:
                raise ValueError(UNKNOWN_LINE_BREAKS)
        return None


class _Index:
    """Where each entry of a collection begins and ends in the file, sorted by a hash of its text."""

    def __init__(self, store: JsonStore, line_breaks: str | None, version: tuple[int, ...]) -> None:
        hashes, begins, ends = array("Q"), array("Q"), array("Q")
        with store.open() as (check_unchanged, entries):
            for key, reader in entries:
                begin = reader.key_offset
                reader.skip()
                hashes.append(_hash_key(key, line_breaks))
                begins.append(begin)
                ends.append(reader.offset)
            check_unchanged()
        self.version = version
        unsorted: NDArray[np.uint64] = np.frombuffer(hashes, np.uint64)
        order = np.argsort(unsorted, kind="stable")
        self.hashes = unsorted[order]
        self._begins: NDArray[np.uint64] = np.frombuffer(begins, np.uint64)[order]
        self._ends: NDArray[np.uint64] = np.frombuffer(ends, np.uint64)[order]

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where the entries begin and end that may be the one of this text.

        The last one comes first, because it counts if a key occurs twice in an object of JSON.
        """
        wanted = np.uint64(_hash_text(text))
        first, last = np.searchsorted(self.hashes, wanted, "left"), np.searchsorted(self.hashes, wanted, "right")
        for at in range(int(last) - 1, int(first) - 1, -1):
            yield int(self._begins[at]), int(self._ends[at])


def _hash_key(key: bytes, line_breaks: str | None) -> int:
    """Return the hash of the text that was embedded for a key, which is a string in JSON.

    A key that is not valid UTF-8 gets a hash that no text has, or that another text has by chance.
    """
    if b"\\" not in key:
        return xxhash.xxh3_64_intdigest(key[1:-1])
    try:
        text = decode_string(key)
    except ValueError:
        return xxhash.xxh3_64_intdigest(key)
    embedded = find_embedded_text(text, line_breaks)
    return _hash_text(text if embedded is None else embedded)


def _hash_text(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


@hookimpl
def embedonce_importers() -> Mapping[str, type[LlamaIndexImporter]]:
    return {"llama-index": LlamaIndexImporter}
