"""Writing results: rows go to a hidden file, which gets the name of the output once the file is complete.

Only a regular file is ever replaced. A ``.npy`` matrix and its index are both complete and on the disk before the
first rename. The earlier index is set aside first; then the matrix is renamed, and the index right after. So an index
never lies beside the matrix of another run, even after a ``kill -9``: between the renames, there is no index. If an
error or a signal occurs there, the earlier matrix and index are restored. The earlier matrix is never removed before
the new matrix is in place.

=========  ==================================================================================
.npy       float32, shape (rows, dimensions); line i of ``NAME.index.jsonl`` describes row i
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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from embedonce.keys import NORMALIZERS
from embedonce.vectors import Matrix

from .columns import KeptColumns
from .passages import Passage

if sys.platform != "win32":
    import fcntl

replace_surrogates = NORMALIZERS["surrogates"]
"""Makes a text that can be written from one with lone surrogates, as the normalisation step of this name does."""
HEADER = 128
"""Size of the .npy header in bytes. The size is fixed, because the space for the header is reserved before the rows are
written. The header itself is written last, when the number of rows is known."""


class Sink(Protocol):
    """Takes rows in order, and moves the output into place at the end."""

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        """Add rows: row i of ``vectors``, shape (n, d), belongs to passage i."""
        ...

    def finish(self, dimensions: int) -> None:
        """Move the output into place; an output without rows gets ``dimensions`` as its number of dimensions."""
        ...

    def abort(self) -> None:
        """Remove the unfinished output. Do nothing after ``finish``."""
        ...


class SinkError(Exception):
    """The output cannot be written to this path or in this format."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a row has beside the place of its passage and its vector."""

    with_text: bool = False
    keep: Sequence[str] = ()
    """Names of the values in ``Passage.kept``."""

    def encode(self, passages: Sequence[Passage]) -> Iterator[str]:
        """Yield for each row the JSON of its fields, except the vector, without the braces."""
        # The passages of a window come from few files.
        encoded = {source: _encode_json(source) for source in {passage.source for passage in passages}}
        for passage in passages:
            place = f'"source": {encoded[passage.source]}, "line": {passage.line}'
            yield place if not (self.with_text or self.keep) else f"{place}{self._encode_rest(passage)}"

    def _encode_rest(self, passage: Passage) -> str:
        fields: dict[str, Any] = {"text": replace_surrogates(passage.text)} if self.with_text else {}
        fields.update(zip(self.keep, passage.kept, strict=True))
        return f", {_encode_json(fields)[1:-1]}"


def open_sink(out: Path, *, with_text: bool = False, keep: Sequence[str] = ()) -> Sink:
    """Open an output in the format of its file suffix. ``keep`` names the values in ``Passage.kept``.

    Raises:
        SinkError: the suffix is unknown, the folder is missing, the path is not a regular file, another run is writing
            the file, or a name in ``keep`` is already the name of a field.
    """
    check_output(out, with_text=with_text, keep=keep)
    return _SINKS[out.suffix.lower()](list_outputs(out)[0], Extras(with_text, tuple(keep)))


def check_output(out: Path, *, with_text: bool = False, keep: Sequence[str] = ()) -> None:
    """Check, without writing anything, that an output can be opened.

    Raises:
        SinkError: as in :func:`open_sink`. Whether another run is writing the file is not checked.
    """
    if out.suffix.lower() not in _SINKS:
        raise SinkError(f"--out {out}: the file name must end in .npy, .jsonl or .parquet")
    finals = list_outputs(out)
    for final in finals:
        obstacle = _find_obstacle(final)
        if obstacle:
            raise SinkError(f"--out {out}: {'' if final == out else f'{final}: '}{obstacle}")
    taken = {"source", "line", "vector"} | ({"text"} if with_text else set()) | ({"row"} if len(finals) > 1 else set())
    for name in keep:
        if name in taken:
            raise SinkError(f'--keep {name}: each row already has a field "{name}" of its own; rename it in the input')


def _find_obstacle(final: Path) -> str | None:
    """Return why no file can be written to this path, or None if a file can be written."""
    try:
        mode = os.lstat(final).st_mode
    except FileNotFoundError:
        return None if final.parent.is_dir() else f"the folder {final.parent} does not exist"
    except OSError as error:
        return error.strerror or type(error).__name__
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "is a circular link" if stat.S_ISLNK(mode) else "is not a regular file"


def list_outputs(out: Path) -> list[Path]:
    """Return the path of an output, and of its index if it has one. If a path is a link, return its target's path."""
    final = _follow_link(out)
    return [final, _follow_link(get_index_path(final))] if out.suffix.lower() == ".npy" else [final]


def _follow_link(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def list_written_files(out: Path) -> list[Path]:
    """Return the paths of the output and its index, and of the hidden files in which they are being written."""
    finals = list_outputs(out)
    return [*finals, *map(_get_part_path, finals)]


def get_index_path(final: Path) -> Path:
    """Return the path of a matrix's index: ``vectors.index.jsonl`` for ``vectors.npy``.

    Any other suffix is kept in the name, so that ``vectors.NPY`` and ``vectors.npy`` have different indexes.
    """
    return final.with_name(f"{final.name.removesuffix('.npy')}.index.jsonl")


def _get_part_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


class _Part:
    """An unfinished file: ``.NAME.part`` beside the final name, locked so that two runs never write the same file.

    The name is always the same, so that the next run reuses the file of a killed run.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = _get_part_path(final)
        try:
            self.file = self._open_locked()
            self.file.truncate(0)
        except OSError as error:
            raise SinkError(f"--out: cannot write {self.path}: {error.strerror}") from error

    def _open_locked(self) -> BinaryIO:
        while True:
            file = open(self.path, "r+b", opener=_open_or_create)  # noqa: SIM115 - open until the run ends
            if not _try_lock(file):
                file.close()
                raise SinkError(f"--out: another run is writing {self.final}")
            # Another run may have renamed or removed this file before it released the lock. Then the path leads to a
            # different file or to none, so try again.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            file.close()

    def finish(self) -> None:
        """Flush the file to the disk, rename it to its final name, and close it."""
        self.sync()
        self.rename()
        self.file.close()

    @property
    def is_renamed(self) -> bool:
        """Whether the file has its final name.

        This asks the file system, because a signal right after the rename could prevent the run from recording that the
        file was renamed.
        """
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return True
        return not self.file.closed and not os.path.samestat(os.fstat(self.file.fileno()), found)

    def sync(self) -> None:
        """Flush the file to the disk."""
        with self._add_path_to_errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            if sys.platform == "win32":  # Windows cannot rename an open file
                self.file.close()

    def rename(self) -> None:
        """Rename the file to its final name, and replace an earlier file."""
        self.require_place()
        with self._add_path_to_errors():
            os.replace(self.path, self.final)

    def require_place(self) -> None:
        """Check again that only a regular file would be replaced, because a run may take hours."""
        obstacle = _find_obstacle(self.final)
        if obstacle:
            raise SinkError(f"{self.final}: {obstacle}")

    @contextmanager
    def _add_path_to_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SinkError(f"{self.final}: {error.strerror or type(error).__name__}") from error

    def abort(self) -> None:
        """Remove the file, then release its lock, so that no other run opens a file that is about to be removed."""
        if self.file.closed:
            return
        is_renamed = self.is_renamed
        if sys.platform == "win32":
            self.file.close()
        if not is_renamed:  # after the rename, the .part name may belong to another run
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # on a full disk, writing the rest of the buffer fails again
            self.file.close()


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _try_lock(file: BinaryIO) -> bool:
    """Lock a file and return True, or return False if another run has the lock."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # the file system has no locks: continue without a lock
    return True


# --- .npy -------------------------------------------------------------------------------------


class NpySink:
    """A .npy file and its index. Rows are written immediately, so that memory use does not grow."""

    def __init__(self, out: Path, extras: Extras) -> None:
        self._extras = extras
        self._matrix = _Part(out)
        try:
            self._index = _Part(_follow_link(get_index_path(out)))
        except SinkError:
            self._matrix.abort()
            raise
        self._rows = 0
        self._dimensions: int | None = None
        self._matrix.file.write(bytes(HEADER))

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _check_dimensions(self._dimensions, vectors)
        self._matrix.file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
        rows = enumerate(self._extras.encode(passages), start=self._rows)
        self._index.file.write("".join([f'{{"row": {row}, {fields}}}\n' for row, fields in rows]).encode())
        self._rows += len(passages)

    def finish(self, dimensions: int) -> None:
        shape = (self._rows, dimensions if self._dimensions is None else self._dimensions)
        self._matrix.file.seek(0)
        self._matrix.file.write(make_npy_header(shape))
        self._matrix.sync()
        self._index.sync()
        _rename_both(self._matrix, self._index)
        self._matrix.file.close()
        self._index.file.close()

    def abort(self) -> None:
        self._matrix.abort()
        self._index.abort()


def _rename_both(matrix: _Part, index: _Part) -> None:
    """Rename a matrix and its index. If this fails, restore the earlier files.

    Without hard links, the matrix cannot be restored once it is replaced. Then it stays without an index.
    """
    index.require_place()
    backups = [_get_backup_path(part.final) for part in (matrix, index)]
    for backup in backups:
        backup.unlink(missing_ok=True)  # left behind by a killed run
    is_first = not matrix.final.exists()
    with suppress(OSError):  # there is no earlier matrix, or the file system has no hard links
        os.link(matrix.final, backups[0])
    try:
        with suppress(FileNotFoundError):
            os.replace(index.final, backups[1])
        matrix.rename()
        index.rename()
    except BaseException:
        if not index.is_renamed:
            _restore(matrix, index, backups, is_first=is_first)
        raise
    finally:
        for backup in backups:
            backup.unlink(missing_ok=True)


def _restore(matrix: _Part, index: _Part, backups: Sequence[Path], *, is_first: bool) -> None:
    if matrix.is_renamed and is_first:
        os.replace(matrix.final, matrix.path)
    elif matrix.is_renamed and backups[0].exists():
        os.replace(backups[0], matrix.final)
    elif matrix.is_renamed:
        return
    if backups[1].exists():
        os.replace(backups[1], index.final)


def _get_backup_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def make_npy_header(shape: tuple[int, int]) -> bytes:
    """Return the .npy header of a float32 matrix in C order: format version 1.0, :data:`HEADER` bytes."""
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    padded = described.ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


# --- .jsonl -----------------------------------------------------------------------------------


class JsonlSink:
    """One JSON object per row."""

    def __init__(self, out: Path, extras: Extras) -> None:
        self._extras = extras
        self._part = _Part(out)
        self._dimensions: int | None = None

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _check_dimensions(self._dimensions, vectors)
        for fields, vector in zip(self._extras.encode(passages), vectors, strict=True):
            # Nine digits restore every float32 exactly, except that -0.0 becomes 0. Nine digits take half the bytes of
            # the seventeen digits of a double.
            values = ", ".join([f"{value:.9g}" for value in vector.tolist()])
            self._part.file.write(f'{{{fields}, "vector": [{values}]}}\n'.encode())

    def finish(self, dimensions: int) -> None:
        self._part.finish()

    def abort(self) -> None:
        self._part.abort()


# --- .parquet ---------------------------------------------------------------------------------


class ParquetSink:
    """A Parquet file, one row group per write."""

    def __init__(self, out: Path, extras: Extras) -> None:
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError:
            raise SinkError("writing Parquet requires pyarrow: pip install 'embedonce[parquet]'") from None
        self._arrow: Any = pyarrow
        self._kept = KeptColumns(pyarrow, extras.keep)
        self._extras = extras
        self._part = _Part(out)
        self._writer: Any = None
        self._dimensions: int | None = None

    def write(self, passages: Sequence[Passage], vectors: Matrix) -> None:
        self._dimensions = _check_dimensions(self._dimensions, vectors)
        kept = [passage.kept for passage in passages]
        if self._kept.widen(kept) and self._writer is not None:
            self._rewrite(self._dimensions)
        schema = self._make_schema(self._dimensions)
        columns = [
            self._arrow.array([passage.source for passage in passages], type=schema.field("source").type),
            self._arrow.array([passage.line for passage in passages], type=self._arrow.int64()),
        ]
        if self._extras.with_text:
            columns.append(
                self._arrow.array([replace_surrogates(passage.text) for passage in passages], type=self._arrow.string())
            )
        columns += self._kept.make_arrays(kept)
        values = self._arrow.array(np.ascontiguousarray(vectors).reshape(-1))
        columns.append(self._arrow.FixedSizeListArray.from_arrays(values, self._dimensions))
        self._get_writer(schema).write_table(self._arrow.Table.from_arrays(columns, schema=schema))

    def _rewrite(self, dimensions: int) -> None:
        """Write the earlier rows again with the new type of a kept column, because a file has one type per column."""
        self._writer.close()
        self._writer = None
        file = self._part.file
        with tempfile.TemporaryFile(dir=self._part.path.parent) as earlier:
            file.seek(0)
            shutil.copyfileobj(file, earlier)
            file.seek(0)
            file.truncate()
            source = self._arrow.parquet.ParquetFile(earlier)
            schema = self._make_schema(dimensions)
            writer = self._get_writer(schema)
            for number in range(source.num_row_groups):
                table = source.read_row_group(number)
                names = [name for name, _ in self._kept.fields]
                rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
                arrays = dict(zip(names, self._kept.make_arrays(rows), strict=True))
                columns = [arrays.get(name, table[name]) for name in schema.names]
                writer.write_table(self._arrow.Table.from_arrays(columns, schema=schema))

    def _make_schema(self, dimensions: int) -> Any:
        arrow = self._arrow
        text = [("text", arrow.string())] if self._extras.with_text else []
        vector = ("vector", arrow.list_(arrow.float32(), dimensions))
        return arrow.schema([("source", arrow.string()), ("line", arrow.int64()), *text, *self._kept.fields, vector])

    def _get_writer(self, schema: Any) -> Any:
        if self._writer is None:
            self._writer = self._arrow.parquet.ParquetWriter(self._part.file, schema)
        return self._writer

    def finish(self, dimensions: int) -> None:
        self._get_writer(self._make_schema(dimensions if self._dimensions is None else self._dimensions)).close()
        self._part.finish()

    def abort(self) -> None:
        if self._writer is not None and not self._part.file.closed:
            with suppress(OSError):  # close() writes a footer; an error is harmless, because the file is removed next
                self._writer.close()
        self._part.abort()


# --- rows -------------------------------------------------------------------------------------


def _encode_json(value: Any) -> str:
    encoded = json.dumps(value, ensure_ascii=False)
    # A lone surrogate in a kept value can only be written as an escape.
    return encoded if _is_valid(encoded) else json.dumps(value)


def _is_valid(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_dimensions(dimensions: int | None, vectors: Matrix) -> int:
    """Return the number of dimensions of ``vectors``. If ``dimensions`` is given, refuse any other number."""
    found = int(vectors.shape[1])
    if dimensions not in (None, found):
        raise SinkError(f"one output cannot have vectors of {dimensions} and of {found} dimensions")
    return found


_SINKS: dict[str, Callable[[Path, Extras], Sink]] = {".npy": NpySink, ".jsonl": JsonlSink, ".parquet": ParquetSink}
