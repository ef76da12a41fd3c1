"""Writing results: rows go to a hidden file beside the output, which gets its name when it is whole.

Nothing but a regular file is ever replaced. A ``.npy`` and its index are both whole and on the disk before
the index takes its name, and the matrix takes its own right after: an error or a signal in between puts the
earlier index back, and only a ``kill -9`` between the two renames can leave the new index beside the earlier
matrix. No earlier matrix is ever gone before the new one is there.

=========  ==================================================================================
.npy       float32, shape (rows, dimensions); ``NAME.index.jsonl`` beside it has line i for row i
.jsonl     one object per row: ``source``, ``line``, ``vector``
.parquet   columns ``source``, ``line``, ``vector`` (a fixed-size list of float32)
=========  ==================================================================================
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
        SinkError: an unknown end, a folder that is missing, something that is no regular file, a file that
            another run is writing.
    """
    if out.suffix.lower() not in _SINKS:
        raise SinkError(f"--out {out}: the name ends in .npy, .jsonl or .parquet")
    finals = finals_of(out)
    for final in finals:
        what = _cannot_be(final)
        if what:
            raise SinkError(f"--out {out}: {'' if final == out else f'{final}: '}{what}")
    return _SINKS[out.suffix.lower()](finals[0], with_text)


def _cannot_be(final: Path) -> str | None:
    """Say why a file cannot be written under this name, or None where it can."""
    try:
        mode = os.lstat(final).st_mode
    except FileNotFoundError:
        return None if final.parent.is_dir() else f"the folder {final.parent} does not exist"
    except OSError as error:
        return error.strerror or type(error).__name__
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "this is a folder"
    return "this link leads back to itself" if stat.S_ISLNK(mode) else "this is no regular file"


def finals_of(out: Path) -> list[Path]:
    """Return where an output goes, and its index where it has one: an output that is a link stays one."""
    final = _followed(out)
    return [final, _followed(index_of(final))] if out.suffix.lower() == ".npy" else [final]


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def written_by(out: Path) -> list[Path]:
    """Return every file that an output may have: its own, its index, and what they are called on the way."""
    finals = finals_of(out)
    return [*finals, *map(_on_the_way, finals)]


def index_of(final: Path) -> Path:
    """Return where a matrix's sources are: ``vectors.npy`` has ``vectors.index.jsonl``.

    A name that ends otherwise keeps its end: ``vectors.NPY`` and ``vectors.npy`` may stand side by side.
    """
    return final.with_name(f"{final.name.removesuffix('.npy')}.index.jsonl")


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
            raise SinkError(f"--out: cannot write {self.path}: {error.strerror}") from error

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
        self.sync()
        self.place()
        self.file.close()

    @property
    def placed(self) -> bool:
        """Whether it has its name. The file system says so, since a signal may come before a note of it is taken."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return True
        return not self.file.closed and not os.path.samestat(os.fstat(self.file.fileno()), found)

    def sync(self) -> None:
        """Bring all of it to the disk."""
        with self._named():
            self.file.flush()
            os.fsync(self.file.fileno())
            if sys.platform == "win32":  # an open file cannot be renamed there
                self.file.close()

    def place(self) -> None:
        """Give it its name, in the place of what has it."""
        what = _cannot_be(self.final)  # once more: a run may take hours
        if what:
            raise SinkError(f"{self.final}: {what}")
        with self._named():
            os.replace(self.path, self.final)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SinkError(f"{self.final}: {error.strerror or type(error).__name__}") from error

    def abort(self) -> None:
        """Remove it; the lock goes last, so that nobody takes over a file that is about to vanish."""
        if self.file.closed:
            return
        placed = self.placed  # then another run may be writing under this name by now
        if sys.platform == "win32":
            self.file.close()
        if not placed:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the rest of the buffer is written
            self.file.close()


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
            self._index = _Part(_followed(index_of(out)))
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
        self._matrix.sync()
        self._index.sync()
        with _kept(self._index.final) as earlier:
            try:
                self._index.place()
                self._matrix.place()
            except BaseException:
                if self._index.placed and not self._matrix.placed:
                    os.replace(earlier or self._index.final, self._index.final if earlier else self._index.path)
                raise
        self._matrix.file.close()
        self._index.file.close()

    def abort(self) -> None:
        self._matrix.abort()
        self._index.abort()


@contextmanager
def _kept(file: Path) -> Iterator[Path | None]:
    """Keep what a file holds under a second name meanwhile; None where there is no such file."""
    earlier = file.with_name(f".{file.name}.old")
    earlier.unlink(missing_ok=True)  # a killed run's
    if not file.exists():
        yield None
        return
    try:
        os.link(file, earlier)
    except OSError:  # a file system without links
        shutil.copyfile(file, earlier)
    try:
        yield earlier
    finally:
        earlier.unlink(missing_ok=True)


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
