"""Writing results: rows go to a hidden file beside the output, which gets its name when it is whole.

=========  ==================================================================================
.npy       float32, shape (rows, dimensions); ``NAME.index.jsonl`` beside it has line i for row i
.jsonl     one object per row: ``source``, ``line``, ``vector``
.parquet   columns ``source``, ``line``, ``vector`` (a fixed-size list of float32)
=========  ==================================================================================
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from .passages import Passage

if sys.platform != "win32":
    import fcntl

Matrix = NDArray[np.float32]
HEADER = 128
"""Bytes of the .npy header, padded so that it can be written last, when the number of rows is known."""


class Sink(Protocol):
    """Takes rows in order, and gives the output its name at the end."""

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        """Add rows: row i of ``vectors``, shape (n, d), is passage i's."""
        ...

    def finish(self, dimensions: int) -> None:
        """Put the output in its place; ``dimensions`` is for one without rows."""
        ...

    def abort(self) -> None:
        """Leave no trace. After ``finish`` it does nothing."""
        ...


class SinkError(Exception):
    """The output cannot be written there, or not in that form."""


def open_sink(out: Path, *, with_text: bool = False) -> Sink:
    """Open the output that the file's end asks for.

    Raises:
        SinkError: an unknown end, a folder that is missing, a file that another run is writing.
    """
    if out.suffix.lower() not in _SINKS:
        raise SinkError(f"--out {out}: the name ends in .npy, .jsonl or .parquet")
    if out.is_dir():
        raise SinkError(f"--out {out}: this is a folder")
    if not out.parent.is_dir():
        raise SinkError(f"--out {out}: the folder {out.parent} does not exist")
    final = Path(os.path.realpath(out))  # an output that is a link stays one
    return _SINKS[out.suffix.lower()](final, with_text)


def written_by(out: Path) -> list[Path]:
    """Return every file that an output may have: its own, its index, and what they are called on the way."""
    finals = [out]
    if out.suffix.lower() == ".npy":
        finals.append(index_of(out))
    return [*finals, *map(_on_the_way, finals)]


def index_of(out: Path) -> Path:
    """Return where a .npy output's sources are: ``vectors.npy`` has ``vectors.index.jsonl``."""
    return out.with_suffix(".index.jsonl")


def _on_the_way(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


class _Part:
    """A file under way: ``.NAME.part`` beside the final name, locked, so that two runs never share one.

    The name is always the same: what a killed run left behind is taken over by the next.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = _on_the_way(final)
        try:
            self.file = self._locked()
            self.file.truncate(0)
        except OSError as error:
            raise SinkError(f"--out: cannot write in {final.parent}: {error.strerror}") from error

    def _locked(self) -> BinaryIO:
        while True:
            file = open(self.path, "r+b", opener=_creating)  # noqa: SIM115 - open until the run ends
            if not _lock(file):
                file.close()
                raise SinkError(f"--out: another run is writing {self.final}")
            # Between opening and locking, the run that held it may have renamed or removed the file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            file.close()

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if sys.platform == "win32":  # an open file cannot be renamed there
            self.file.close()
        os.replace(self.path, self.final)
        self.file.close()

    def abort(self) -> None:
        """Remove it; the lock goes last, so that nobody takes over a file that is about to vanish."""
        if self.file.closed:
            return
        if sys.platform == "win32":
            self.file.close()
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the rest of the buffer is written
            self.file.close()


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _lock(file: BinaryIO) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks: the name alone has to do
    return True


# --- .npy -------------------------------------------------------------------------------------


class NpySink:
    """A .npy file and its index; no row is held back."""

    def __init__(self, out: Path, with_text: bool = False) -> None:
        self._with_text = with_text
        self._matrix = _Part(out)
        try:
            self._index = _Part(index_of(out))
        except SinkError:
            self._matrix.abort()
            raise
        self._rows = 0
        self._dimensions: int | None = None
        self._matrix.file.write(bytes(HEADER))

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _same(self._dimensions, vectors)
        self._matrix.file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        lines = []
        for row, passage in enumerate(passages, start=self._rows):
            lines.append(json.dumps({"row": row, **_about(passage, self._with_text)}, ensure_ascii=False) + "\n")
        self._index.file.write("".join(lines).encode())
        self._rows += len(passages)

    def finish(self, dimensions: int) -> None:
        shape = (self._rows, dimensions if self._dimensions is None else self._dimensions)
        self._matrix.file.seek(0)
        self._matrix.file.write(npy_header(shape))
        # Never an index beside another run's matrix: for a moment there is no matrix instead.
        self._matrix.final.unlink(missing_ok=True)
        self._index.finish()
        self._matrix.finish()

    def abort(self) -> None:
        self._matrix.abort()
        self._index.abort()


def npy_header(shape: tuple[int, int]) -> bytes:
    """Return the first :data:`HEADER` bytes of a .npy file, version 1.0 of numpy's format, float32, C order."""
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    padded = described.ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


# --- .jsonl -----------------------------------------------------------------------------------


class JsonlSink:
    """One JSON object per row."""

    def __init__(self, out: Path, with_text: bool = False) -> None:
        self._with_text = with_text
        self._part = _Part(out)
        self._dimensions: int | None = None

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _same(self._dimensions, vectors)
        for passage, vector in zip(passages, vectors, strict=True):
            about = json.dumps(_about(passage, self._with_text), ensure_ascii=False)
            # Nine digits bring every float32 back (-0.0 as 0), in half the bytes of a double's seventeen.
            values = ", ".join([f"{value:.9g}" for value in vector.tolist()])
            self._part.file.write(f'{about[:-1]}, "vector": [{values}]}}\n'.encode())

    def finish(self, dimensions: int) -> None:
        self._part.finish()

    def abort(self) -> None:
        self._part.abort()


# --- .parquet ---------------------------------------------------------------------------------


class ParquetSink:
    """A Parquet file, one row group per write."""

    def __init__(self, out: Path, with_text: bool = False) -> None:
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError:
            raise SinkError("writing Parquet needs pyarrow: pip install 'embedonce[parquet]'") from None
        self._arrow: Any = pyarrow
        self._with_text = with_text
        self._part = _Part(out)
        self._writer: Any = None
        self._dimensions: int | None = None

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _same(self._dimensions, vectors)
        schema = self._schema(self._dimensions)
        columns = [
            self._arrow.array([passage.source for passage in passages], type=schema.field("source").type),
            self._arrow.array([passage.line for passage in passages], type=self._arrow.int64()),
        ]
        if self._with_text:
            columns.append(self._arrow.array([passage.text for passage in passages], type=self._arrow.string()))
        values = self._arrow.array(np.ascontiguousarray(vectors).reshape(-1))
        columns.append(self._arrow.FixedSizeListArray.from_arrays(values, self._dimensions))
        self._open(schema).write_table(self._arrow.Table.from_arrays(columns, schema=schema))

    def _schema(self, dimensions: int) -> Any:
        arrow = self._arrow
        text = [("text", arrow.string())] if self._with_text else []
        vector = ("vector", arrow.list_(arrow.float32(), dimensions))
        return arrow.schema([("source", arrow.string()), ("line", arrow.int64()), *text, vector])

    def _open(self, schema: Any) -> Any:
        if self._writer is None:
            self._writer = self._arrow.parquet.ParquetWriter(self._part.file, schema)
        return self._writer

    def finish(self, dimensions: int) -> None:
        self._open(self._schema(dimensions if self._dimensions is None else self._dimensions)).close()
        self._part.finish()

    def abort(self) -> None:
        if self._writer is not None and not self._part.file.closed:
            with suppress(OSError):  # it writes its footer, into a file that goes away
                self._writer.close()
        self._part.abort()


# --- rows -------------------------------------------------------------------------------------


def _about(passage: Passage, with_text: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"source": passage.source, "line": passage.line}
    if with_text:
        about["text"] = passage.text
    return about


def _same(dimensions: int | None, vectors: Matrix) -> int:
    found = int(vectors.shape[1])
    if dimensions not in (None, found):
        raise SinkError(f"vectors of {dimensions} and of {found} dimensions do not fit one output")
    return found


_SINKS: dict[str, Callable[[Path, bool], Sink]] = {".npy": NpySink, ".jsonl": JsonlSink, ".parquet": ParquetSink}
