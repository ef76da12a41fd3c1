"""The ``llama-index`` importer: the embeddings cache of LlamaIndex in a JSON file.

LlamaIndex's ``embeddings_cache=SimpleKVStore()``, after ``persist``, is one JSON file. It holds all collections of the
store: ``{"embeddings": {text: {uuid: [numbers]}}}``. The file does not say which model made the vectors.
"""

from __future__ import annotations

import io
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import collect_vectors
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
    changed. It takes one or two seconds per gigabyte.
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
        with self._store.open_file() as file:
            version = self._store.get_version(file)
            with self._store.explain_errors(file, version):
                index = self._read_index(file, version)
                stored = ((text, raw) for text in texts if (raw := _find_entry(file, index, text)) is not None)
                found = collect_vectors(stored, self._read_asked)
            self._store.check_unchanged(file, version)
        return found

    def scan(self) -> Iterator[FoundVectors]:
        """Yield all texts of the collection.

        Raises:
            SourceError: the file cannot be read, is not a store of LlamaIndex, or has changed meanwhile.
        """
        with self._store.open() as (check_unchanged, entries):
            items = ((key, reader.read()) for key, reader in entries)
            while True:
                found = collect_vectors(islice(items, PART), self._read_listed)
                check_unchanged()
                if not found.texts and not found.unreadable:
                    return
                yield found

    def count(self) -> int | None:
        """Return the number of texts if a lookup has counted them already."""
        index = self._index
        return None if index is None else len(index.hashes)

    def close(self) -> None:
        """Forget the index. No file stays open between two calls."""
        self._index = None

    def _read_index(self, file: BinaryIO, version: tuple[int, ...]) -> _Index:
        """Return the index of this version of the file. One thread makes it, and the others wait for it."""
        if self._pid != os.getpid():  # at the fork, a thread of the parent may have held the lock
            self._lock, self._pid = threading.Lock(), os.getpid()
        seconds = time_left()
        if not self._lock.acquire(timeout=-1 if seconds is None else max(0.0, seconds)):
            raise SourceError(
                f"{self._store.path} is still being read for the first lookup, which takes one or two seconds "
                "per gigabyte; import the whole file with `embedonce import` instead"
            )
        try:
            if self._index is None or self._index.version != version:
                self._index = _Index(self._store.read_entries(file), self._line_breaks, version)
            return self._index
        finally:
            self._lock.release()

    def _read_asked(self, item: tuple[str, bytes]) -> tuple[str, DecodedVector]:
        text, raw = item
        if find_embedded_text(text, self._line_breaks) is None:
            raise ValueError(UNKNOWN_LINE_BREAKS)
        return text, decode_entry(raw)

    def _read_listed(self, item: tuple[bytes, bytes]) -> tuple[str, DecodedVector]:
        key, raw = item
        text = find_embedded_text(decode_string(key), self._line_breaks)
        if text is None:
            raise ValueError(UNKNOWN_LINE_BREAKS)
        return text, decode_entry(raw)


class _Index:
    """Where each entry of a collection begins and ends in the file, sorted by a hash of its text."""

    def __init__(
        self, entries: Iterable[tuple[bytes, JsonReader]], line_breaks: str | None, version: tuple[int, ...]
    ) -> None:
        hashes, begins, ends = array("Q"), array("Q"), array("Q")
        for key, reader in entries:
            begin = reader.key_offset
            reader.skip()
            hashes.append(_hash_key(key, line_breaks))
            begins.append(begin)
            ends.append(reader.offset)
        self.version = version
        self.line_breaks = line_breaks
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


def _find_entry(file: BinaryIO, index: _Index, text: str) -> bytes | None:
    """Return the value of a text as JSON; None if the file does not have the text."""
    for begin, end in index.find(text):
        if end - begin > MAX_PIECE:  # so it is no vector, and too long to compare its text
            continue
        file.seek(begin)
        # Two texts may have the same hash, so the key is compared.
        reader = JsonReader(io.BytesIO(b"{" + file.read(end - begin) + b"}"))
        if _read_key(next(reader.members()), index.line_breaks) == text:
            return reader.read()
    return None


def _hash_key(key: bytes, line_breaks: str | None) -> int:
    if b"\\" not in key:
        return xxhash.xxh3_64_intdigest(key[1:-1])
    text = _read_key(key, line_breaks)
    return xxhash.xxh3_64_intdigest(key) if text is None else _hash_text(text)


def _read_key(key: bytes, line_breaks: str | None) -> str | None:
    """Return the text under which an entry is found, of its key in JSON; None if the key is not valid.

    It is the text that was embedded. If that is not known, it is the stored one, so that it can be counted.
    """
    try:
        stored = decode_string(key)
    except ValueError:
        return None
    embedded = find_embedded_text(stored, line_breaks)
    return stored if embedded is None else embedded


def _hash_text(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


@hookimpl
def embedonce_importers() -> Mapping[str, type[LlamaIndexImporter]]:
    return {"llama-index": LlamaIndexImporter}
