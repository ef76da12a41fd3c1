"""The ``langchain`` importer: LangChain's CacheBackedEmbeddings over a LocalFileStore.

The store is a folder with one file per text. The file is named by the namespace and a hash of the text, with nothing
between them, and its content is a JSON list of numbers. A namespace with slashes, such as ``BAAI/bge-m3``, makes
subfolders, and the part after the last slash begins the names of the files.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, time_left
from embedonce.errors import ConfigError, SourceError
from embedonce.options import Doc

from ._files import Folder, open_folder
from ._langchain_keys import (
    PATTERNS,
    KeyEncoder,
    KeyEncoderOption,
    NamespaceOption,
    QueryCacheOption,
    check_key_encoder,
    encode_key,
    make_source,
)
from ._values import MAX_VALUE_BYTES, DecodedVector, decode_json

api = 1

MAX_LISTED = 10_000
"""Maximum number of files whose names are read to suggest other options."""

TEXTS_PER_DEADLINE = 64
"""Texts between two looks at the time that is left: on a slow disk, the files of so many take about half a second."""


class LangChainImporter:
    """Finds vectors that CacheBackedEmbeddings has stored in files."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("Folder of the LocalFileStore.")],
        namespace: NamespaceOption = "",
        key_encoder: KeyEncoderOption = "sha1",
        query_embedding_cache: QueryCacheOption = None,
    ) -> None:
        check_key_encoder(key_encoder)
        *folders, prefix = namespace.split("/")
        # A LocalFileStore refuses such a namespace too.
        if not re.fullmatch(r"[a-zA-Z0-9_.\-/]*", namespace) or namespace.startswith("/") or ".." in folders:
            raise ConfigError(
                "namespace must be one that a LocalFileStore accepts: letters, digits, _, ., - and /, without / at the "
                "start and without .."
            )
        self._path = Path(path)
        self._folders = [name for name in folders if name not in ("", ".")]
        self._prefix = prefix
        self._namespace = namespace
        self._key_encoder: KeyEncoder = key_encoder
        self.source = make_source(
            f"langchain: {self._path.absolute()}, namespace={namespace!r}, key_encoder={key_encoder}",
            query_embedding_cache=query_embedding_cache,
        )

    def __repr__(self) -> str:
        return f"<LangChainImporter of {self.source.name}>"

    def check(self) -> None:
        """Look for a file of LangChain. If there is none with these options, this reads the names of all files.

        Raises:
            SourceError: the folder is missing, or has no file with these options.
        """
        form = re.compile(re.escape(self._prefix) + PATTERNS[self._key_encoder])
        with self._open() as folder:
            if folder is not None and any(map(form.fullmatch, folder.iter_names())):
                return
        problem = f"{self._path} has no file of LangChain with the namespace {self._namespace!r}"
        encoders, namespaces = self._find_others()
        if encoders:
            raise SourceError(f"{problem} and the key encoder {self._key_encoder}; set key_encoder to {encoders}")
        advice = "set path to the folder of the LocalFileStore, and namespace to the argument of from_bytes_store"
        raise SourceError(f"{problem}; {advice}. {namespaces}" if namespaces else f"{problem}; {advice}")

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the folder has."""
        with self._open() as folder:
            return FoundVectors([], []) if folder is None else self._read_vectors(folder, texts)

    def close(self) -> None:
        """Do nothing, because no file stays open after a call."""

    @contextmanager
    def _open(self) -> Iterator[Folder | None]:
        """Open the folder of the files for the duration of a ``with`` block; None if the namespace has no folder."""
        with ExitStack() as stack:
            root = stack.enter_context(open_folder(self._path))
            try:
                folder = stack.enter_context(root.open_subfolder(*self._folders))
            except ValueError:
                raise SourceError(
                    f"{self._path} has something that is not a folder, such as a link, in place of a folder of the "
                    f"namespace {self._namespace!r}"
                ) from None
            yield folder

    def _read_vectors(self, folder: Folder, texts: Sequence[str]) -> FoundVectors:
        found: list[str] = []
        vectors: list[DecodedVector] = []
        unreadable: Counter[str] = Counter()
        for number, text in enumerate(texts):
            if number % TEXTS_PER_DEADLINE == 0:
                time_left()  # raises an error after the deadline
            name = encode_key(text, self._prefix, self._key_encoder)
            if name is None:
                continue
            try:
                content = folder.read(name, MAX_VALUE_BYTES)
                if content is None:
                    continue
                vectors.append(decode_json(content))
            except ValueError as error:
                unreadable[str(error)] += 1
            else:
                found.append(text)
        return FoundVectors(found, vectors, unreadable)

    def _find_others(self) -> tuple[str, str]:
        """Return the key encoders of files in the namespace, and a sentence about other namespaces. Both may be ""."""
        encoders: set[str] = set()
        namespaces: set[str] = set()
        with open_folder(self._path) as root:
            for name in itertools.islice(_walk(root), MAX_LISTED):
                for encoder, form in _FORMS.items():
                    if match := form.fullmatch(name):
                        namespaces.add(match[1])
                        if match[1] == self._namespace:
                            encoders.add(encoder)
        shown = ", ".join(repr(name) for name in sorted(namespaces - {self._namespace})[:10])
        return " or ".join(sorted(encoders)), f"It has files with these namespaces: {shown}" if shown else ""


_FORMS = {encoder: re.compile(f"(.*?){pattern}") for encoder, pattern in PATTERNS.items()}


def _walk(folder: Folder, parents: str = "", depth: int = 2) -> Iterator[str]:
    """Yield the paths of the files in a folder and in the folders below it, which are LangChain's keys."""
    for name in folder.iter_names():
        with ExitStack() as stack:
            try:
                below = stack.enter_context(folder.open_subfolder(name)) if depth else None
            except ValueError:  # it is not a folder
                below = None
            if below is None:
                yield parents + name
            else:
                yield from _walk(below, f"{parents}{name}/", depth - 1)


@hookimpl
def embedonce_importers() -> Mapping[str, type[LangChainImporter]]:
    return {"langchain": LangChainImporter}
