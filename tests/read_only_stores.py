"""Read-only stores for tests: a backend in a dict, and bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedonce import Cache
from embedonce.contracts import Capabilities
from embedonce.errors import TierError
from embedonce.testing import DictBackend
from embedonce.vectors import decode_frames


class ReadOnlyDict:
    """Reads values from a dict. Like a bundle, it says that it belongs to the host, and it can count."""

    def __init__(self, items: Mapping[str, Any], **capabilities: Any) -> None:
        declared = {"holds": "either", "scan": True, "count": True, "bounded": True, "read_only": True, **capabilities}
        self.capabilities = Capabilities(**declared)
        self.items = dict(items)
        self.damaged = False
        self.verified = 0
        self.closed = False

    def get_many(self, keys: Sequence[str]) -> dict[str, Any]:
        self._check_open()
        return {key: self.items[key] for key in keys if key in self.items}

    def get(self, key: str) -> Any:
        return self.get_many([key]).get(key)

    def scan(self, prefix: str) -> Iterator[str]:
        self._check_open()
        return iter(sorted(key for key in self.items if key.startswith(prefix)))

    def count(self, prefix: str) -> int:
        return sum(1 for _ in self.scan(prefix))

    def verify(self) -> str:
        self._check_open()
        self.verified += 1
        if self.damaged:
            raise TierError("a value is damaged; make the store again")
        return f"{len(self.items)} values are intact"

    def close(self) -> None:
        self.closed = True

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the store is closed")


class WritableLater(ReadOnlyDict):
    """A read-only backend for which embedonce export can write a new store."""

    @staticmethod
    def create_writer(path: Any, *, replace: bool) -> Any:
        raise NotImplementedError


def export_to_bundle(folder: Path, provider: Any, texts: Sequence[str], **options: Any) -> None:
    """Write a bundle with the vectors of some texts."""
    from embedonce_backends.bundle import BundleBackend

    backend = DictBackend(scope="host")
    with Cache(provider, [backend], **options) as cache:
        cache.embed_batch(list(texts))
        frames = backend.get_many([key for key in backend.scan("eo1.") if not key.startswith("eo1.savings")])
    entries = decode_frames(frames, now=0.0, dtype="float32", dimensions=None).entries.as_dict()
    writer = BundleBackend.create_writer(folder, replace=False)
    try:
        writer.add({key: entries[key] for key in sorted(entries)})
        writer.commit()
    finally:
        writer.close()
