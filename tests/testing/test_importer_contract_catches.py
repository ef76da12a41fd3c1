"""The conformance kit finds bugs of importers: every standard test catches an importer that is broken in one way."""

from __future__ import annotations

import os
import re
import socket
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_runs import Rendezvous, is_failing
from embedonce_records import (
    LosesItsPathInAPickle,
    NamesItsSourceByHash,
    RecordsImporter,
    damage_record,
    write_records,
)

from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.testing import ImporterContract, Recipe

# --- broken importers -------------------------------------------------------------------------


class OnlyChecks(RecordsImporter):
    """Has neither `lookup` nor `scan`."""

    lookup = None
    scan = None


class CountsNothing(RecordsImporter):
    """Has `scan` but no `count`."""

    count = None


class TakesItsPathByPosition(RecordsImporter):
    """Takes its path as a positional argument, which TOML cannot give."""

    def __init__(self, path: Path, *, password: str = "") -> None:
        super().__init__(path=path, password=password)


class HasAnOptionTask(RecordsImporter):
    """Has an option `task`, which is an option of embedonce."""

    def __init__(self, *, path: Path, password: str = "", task: str = "query") -> None:
        super().__init__(path=path, password=password)


class CallsItsPathFile(RecordsImporter):
    """Calls its option `file`, which `embedonce import` does not know."""

    def __init__(self, *, file: Path | None = None, **options: Any) -> None:
        super().__init__(**options)


class TakesItsPathAsText(RecordsImporter):
    """Declares its path as `str`, so that a path is not relative to the configuration."""

    def __init__(self, *, path: str, password: str = "") -> None:
        super().__init__(path=Path(path), password=password)


class NamesItsSourceAsItIsRead(RecordsImporter):
    """Adds what it has read to the name of its source."""

    reads = 0

    def read(self):
        self.reads += 1
        return super().read()

    @property
    def source(self):
        return Source(f"{self.path}, read {self.reads} times")


class NamesNothing(RecordsImporter):
    """Has a source without a name."""

    @property
    def source(self):
        return Source("")


class NamesItself(RecordsImporter):
    """Puts the identity of the instance into the name of its source."""

    @property
    def source(self):
        return Source(f"{self.path}, {id(self)}")


class NamesItsKindOnly(RecordsImporter):
    """Gives the sources of all stores one name."""

    @property
    def source(self):
        return Source("records")


class ShowsItsOptions(RecordsImporter):
    """Shows a password in its repr."""

    def __repr__(self):
        return f"RecordsImporter(path={self.path}, password={self.password})"


class ShowsItsLastTexts(RecordsImporter):
    """Shows the texts of the last call in its repr."""

    texts = ()

    def lookup(self, texts, /):
        self.texts = texts
        return super().lookup(texts)

    def __repr__(self):
        return f"RecordsImporter({self.texts})"


class ChecksOnce(RecordsImporter):
    """Raises at the second call of `check`."""

    is_checked = False

    def check(self):
        if self.is_checked:
            raise RuntimeError("the file is open already")
        self.is_checked = True


class AnswersTheCheck(RecordsImporter):
    """Returns False from `check` instead of raising an error."""

    def check(self):
        return self.path.exists()


class ReadsInItsConstructor(RecordsImporter):
    """Opens its file in the constructor, so that a missing file is an error of the configuration."""

    def __init__(self, *, path: Path, password: str = "") -> None:
        super().__init__(path=path, password=password)
        self.check()


class NamesNoFile(RecordsImporter):
    """Does not say which file is missing."""

    def check(self):
        try:
            super().check()
        except SourceError:
            raise SourceError("the file cannot be read; check the options") from None


class RaisesTheErrorOfItsClient(RecordsImporter):
    """Raises `FileNotFoundError` instead of `SourceError` if its file is missing."""

    def check(self):
        self.path.stat()


class ChecksNothing(RecordsImporter):
    """Has a `check` that does nothing."""

    def check(self):
        pass


class ShowsItsPassword(RecordsImporter):
    """Shows a password in the error about a missing store."""

    def check(self):
        if not self.path.exists():
            raise SourceError(f"cannot open {self.path} with the password {self.password}")


class TakesMissingForEmpty(RecordsImporter):
    """Answers as if a missing store were empty."""

    def read(self):
        return super().read() if self.path.exists() else ""


class ShowsTheTextThatItLooksFor(RecordsImporter):
    """Shows the texts of a call in an error."""

    def lookup(self, texts, /):
        try:
            return super().lookup(texts)
        except SourceError as error:
            raise SourceError(f"{error}: looking up {texts}") from error


class RaisesForADamagedValue(RecordsImporter):
    """Fails as a whole if one value cannot be read."""

    def find_rows(self, wanted=None):
        rows, unreadable = super().find_rows(wanted)
        if unreadable:
            raise SourceError("a value cannot be read")
        return rows, unreadable


class CountsNoDamage(RecordsImporter):
    """Does not count values that it cannot read."""

    def find_rows(self, wanted=None):
        return super().find_rows(wanted)[0], {}


class NamesWhatIsDamaged(RecordsImporter):
    """Counts a value that it cannot read under its text."""

    def lookup(self, texts, /):
        found = super().lookup(texts)
        return FoundVectors(found.texts, found.vectors, {str(texts): 1} if found.unreadable else {})


class ReplacesDamageByZeros(RecordsImporter):
    """Returns a vector of zeros for a value that it cannot read, and counts it."""

    def lookup(self, texts, /):
        found = super().lookup(texts)
        lost = [text for text in texts if text not in found.texts and text.startswith("A private")]
        zeros = [np.zeros(8, np.float32) for _ in lost]
        return FoundVectors([*found.texts, *lost], [*found.vectors, *zeros], found.unreadable)


class CountsItsReadsInTheStore(RecordsImporter):
    """Stores beside the file how often it was read."""

    def read(self):
        with self.path.with_suffix(".reads").open("a") as file:
            file.write("1")
        return super().read()


class ReturnsNoneForAMiss(RecordsImporter):
    """Returns None for texts that the store does not have, instead of leaving them out."""

    def lookup(self, texts, /):
        rows = self.find_rows(frozenset(texts))[0]
        return FoundVectors(texts, [rows.get(text) for text in texts])


class ReturnsEverything(RecordsImporter):
    """Returns all texts of the store, not only those that it was asked for."""

    def lookup(self, texts, /):
        return FoundVectors(*(list(part) for part in (self.find_rows()[0], self.find_rows()[0].values())))


class ReturnsADict(RecordsImporter):
    """Returns a dict instead of `FoundVectors`."""

    def lookup(self, texts, /):
        return self.find_rows(frozenset(texts))[0]


class KeepsTheOrderOfTheStore(RecordsImporter):
    """Returns the texts in the order of the call, and the vectors in the order of the store."""

    def lookup(self, texts, /):
        rows, unreadable = self.find_rows(frozenset(texts))
        return FoundVectors([text for text in texts if text in rows], list(rows.values()), unreadable)


class LooksUpNineHundred(RecordsImporter):
    """Looks up at most 999 texts, the maximum number of parameters of older versions of SQLite."""

    def lookup(self, texts, /):
        return super().lookup(texts[:999])


class Compares(RecordsImporter):
    """Finds a text by a key that is made from it."""

    def make_key(self, text: str) -> str:
        raise NotImplementedError

    def lookup(self, texts, /):
        rows = {self.make_key(text): row for text, row in self.find_rows()[0].items()}
        found = [text for text in texts if self.make_key(text) in rows]
        return FoundVectors(found, [rows[self.make_key(text)] for text in found])


class FoldsCase(Compares):
    """Ignores upper and lower case, as the collation of a database may do."""

    def make_key(self, text):
        return text.casefold()


class StripsTexts(Compares):
    """Removes white space around a text, as a reader of CSV may do."""

    def make_key(self, text):
        return text.strip()


class NormalizesUnicode(Compares):
    """Normalises texts to NFC, which the program that wrote the store did not do."""

    def make_key(self, text):
        return unicodedata.normalize("NFC", text)


class CutsAtNul(Compares):
    """Cuts a text at a NUL character, as C does."""

    def make_key(self, text):
        return text.partition("\0")[0]


class CutsLongTexts(Compares):
    """Compares only the first 255 characters of a text."""

    def make_key(self, text):
        return text[:255]


class ReadsNumbers(Compares):
    """Reads a text that looks like a number as a number, as a reader of CSV may do."""

    def make_key(self, text):
        return str(float(text)) if re.fullmatch(r"[0-9.]*[0-9]", text) else text


class TakesATextForAPattern(RecordsImporter):
    """Takes a text for a pattern, as `LIKE` does."""

    def lookup(self, texts, /):
        rows = self.find_rows()[0]
        # fnmatch is slow for long patterns, so only short texts are patterns here.
        found = {text: rows[text] for text in texts if text in rows} | {
            text: row for text in texts for stored, row in rows.items() if len(text) < 9 and fnmatch(stored, text)
        }
        return FoundVectors(list(found), list(found.values()))


class TakesATextForAKey(RecordsImporter):
    """Also looks for a text among the keys of the store, which are digests."""

    def lookup(self, texts, /):
        rows = {}
        for text, row in self.find_rows()[0].items():
            rows |= {text: row, sha256(text.encode()).hexdigest(): row}
        found = [text for text in texts if text in rows]
        return FoundVectors(found, [rows[text] for text in found])


class ReplacesSlashes(Compares):
    """Replaces characters that a file name cannot have, so that two texts may have one file."""

    def make_key(self, text):
        return re.sub(r"[/:|]", "-", text)


class SortsTheList(RecordsImporter):
    """Sorts the list of texts that it is given."""

    def lookup(self, texts, /):
        if isinstance(texts, list):
            texts.sort()
        return super().lookup(texts)


class UsesOneBuffer(RecordsImporter):
    """Returns the same buffer from every call of `lookup`."""

    def __init__(self, *, path: Path, password: str = "") -> None:
        super().__init__(path=path, password=password)
        self.buffer = np.zeros((2000, 8), np.float32)

    def lookup(self, texts, /):
        found = super().lookup(texts)
        for place, row in enumerate(found.vectors):
            self.buffer[place] = row
        return FoundVectors(found.texts, self.buffer[: len(found.texts)])


class HasOnePlaceForTexts(RecordsImporter):
    """Keeps the texts of a call in a variable that threads share."""

    def __init__(self, *, path: Path, password: str = "") -> None:
        super().__init__(path=path, password=password)
        self.rendezvous = Rendezvous(times=2)

    def lookup(self, texts, /):
        self.texts = texts
        self.rendezvous()  # every thread has set its texts
        texts = self.texts
        self.rendezvous()  # every thread has read the attribute
        return super().lookup(texts)


class ReadsSixDecimals(RecordsImporter):
    """Rounds the values to six decimals."""

    def find_rows(self, wanted=None):
        rows, unreadable = super().find_rows(wanted)
        return {text: row.round(6) for text, row in rows.items()}, unreadable


class NormalizesVectors(RecordsImporter):
    """Normalises the vectors to length 1."""

    def find_rows(self, wanted=None):
        rows, unreadable = super().find_rows(wanted)
        return {text: row / np.linalg.norm(row) for text, row in rows.items()}, unreadable


class TakesTheFirstRowForAHeader(RecordsImporter):
    """Skips the first row in `scan`, as if it were a header."""

    def scan(self):
        for number, part in enumerate(super().scan()):
            start = number == 0
            yield FoundVectors(part.texts[start:], part.vectors[start:], part.unreadable)


class YieldsOneBuffer(RecordsImporter):
    """Yields the same matrix in each part of a scan, with new vectors."""

    def scan(self):
        texts, rows = (list(part) for part in zip(*self.find_rows()[0].items(), strict=True))
        buffer = np.zeros((20, 8), np.float32)
        for start in range(0, len(texts), 20):
            part = rows[start : start + 20]
            buffer[: len(part)] = part
            yield FoundVectors(texts[start : start + 20], buffer[: len(part)])


class YieldsAnotherOrderEachTime(RecordsImporter):
    """Yields the texts in a different order in each scan, as a hash table may do."""

    scans = 0

    def find_rows(self, wanted=None):
        self.scans += 1
        rows, unreadable = super().find_rows(wanted)
        return dict(sorted(rows.items(), reverse=bool(self.scans % 2))), unreadable


class YieldsOnePart(RecordsImporter):
    """Reads the whole store into memory, and yields it in one part."""

    def scan(self):
        rows, unreadable = self.find_rows()
        yield FoundVectors(list(rows), list(rows.values()), unreadable)


class HasOneCursor(RecordsImporter):
    """Keeps the position of a scan in a variable that all scans share."""

    position = 0

    def scan(self):
        rows = list(self.find_rows()[0].items())
        while part := rows[self.position : self.position + 20]:
            self.position += 20
            yield FoundVectors([text for text, _ in part], [row for _, row in part])
        self.position = 0


class CountsBytes(RecordsImporter):
    """Returns the size of its file from `count`."""

    def count(self):
        return self.path.stat().st_size


class EndsAScanToLookUp(RecordsImporter):
    """Has one cursor, so that `lookup` ends a scan that is not finished."""

    lookups = 0

    def lookup(self, texts, /):
        self.lookups += 1
        return super().lookup(texts)

    def scan(self):
        rows, before = list(self.find_rows()[0].items()), self.lookups
        for start in range(0, len(rows), 20):
            if self.lookups != before:
                return
            part = rows[start : start + 20]
            yield FoundVectors([text for text, _ in part], [row for _, row in part])


class ClosesOnceOnly(RecordsImporter):
    """Raises when it is closed twice."""

    def close(self):
        if self.closed:
            raise RuntimeError("closed twice")
        super().close()


class ClosesWhatItNeverOpened(RecordsImporter):
    """Raises when it is closed before it was used."""

    def read(self):
        self.file = self.path.open()
        self.file.close()
        return super().read()

    def close(self):
        self.file.close()


class ReadsZerosAfterClose(RecordsImporter):
    """Returns vectors of zeros after `close`."""

    def read(self):
        return self.path.read_text()

    def find_rows(self, wanted=None):
        rows, unreadable = super().find_rows(wanted)
        return {text: row * (not self.closed) for text, row in rows.items()}, unreadable


class FindsNothingInAForkedChild(RecordsImporter):
    """Answers in a forked child as if the store were empty."""

    def __init__(self, *, path: Path, password: str = "") -> None:
        super().__init__(path=path, password=password)
        self.process = os.getpid()

    def read(self):
        return super().read() if os.getpid() == self.process else ""


class EndsItsParentsConnection(RecordsImporter):
    """Refuses to read in a forked child, but its `close` there ends the connection of the parent."""

    def __init__(self, *, path: Path, password: str = "") -> None:
        super().__init__(path=path, password=password)
        self.process = os.getpid()
        self.client, server = socket.socketpair()
        self.thread = threading.Thread(target=self.serve, args=(server,), daemon=True)
        self.thread.start()

    def serve(self, server: socket.socket) -> None:
        with server:
            while server.recv(1) == b"?":
                server.sendall(b"!")

    def read(self):
        if os.getpid() != self.process:
            raise RuntimeError("this importer was made in another process")
        self.client.sendall(b"?")
        if self.client.recv(1) != b"!":
            raise ConnectionError("the connection was closed")
        return super().read()

    def close(self):
        if self.client.fileno() != -1:
            with suppress(OSError):
                self.client.sendall(b"x")  # says goodbye
            self.client.close()


class TakesALateReply(RecordsImporter):
    """Leaves a store that stalls in time, but takes its late reply for the reply to the next call."""

    late: Any = None

    def lookup(self, texts, /):
        if self.late is not None:
            late, self.late = self.late, None
            return late
        try:
            return super().lookup(texts)
        except TimeoutError:
            self.stalled.clear()
            self.late = super().lookup(texts)  # the reply arrives after the deadline
            raise


BROKEN_IMPORTERS: list[tuple[str, Callable[..., Any]]] = [
    ("test_the_methods_are_there", OnlyChecks),
    ("test_the_methods_are_there", CountsNothing),
    ("test_options_can_be_written_in_toml", TakesItsPathByPosition),
    ("test_options_can_be_written_in_toml", HasAnOptionTask),
    ("test_options_can_be_written_in_toml", CallsItsPathFile),
    ("test_options_can_be_written_in_toml", TakesItsPathAsText),
    ("test_the_source_is_described_and_stays", NamesItsSourceAsItIsRead),
    ("test_the_source_is_described_and_stays", NamesNothing),
    ("test_two_importers_of_one_store_have_one_source", NamesItself),
    ("test_another_store_is_another_source", NamesItsKindOnly),
    ("test_no_text_and_no_secret_is_shown", ShowsItsOptions),
    ("test_no_text_and_no_secret_is_shown", ShowsItsLastTexts),
    ("test_check_accepts_a_store_that_can_be_read", ChecksOnce),
    ("test_check_accepts_a_store_that_can_be_read", AnswersTheCheck),
    ("test_a_missing_store_is_named_by_check", ReadsInItsConstructor),
    ("test_a_missing_store_is_named_by_check", NamesNoFile),
    ("test_a_missing_store_is_named_by_check", RaisesTheErrorOfItsClient),
    ("test_a_missing_store_is_named_by_check", ChecksNothing),
    ("test_a_missing_store_is_named_by_check", ShowsItsPassword),
    ("test_a_missing_store_is_an_error_and_no_miss", TakesMissingForEmpty),
    ("test_a_missing_store_is_an_error_and_no_miss", ShowsTheTextThatItLooksFor),
    ("test_a_damaged_value_is_counted", RaisesForADamagedValue),
    ("test_a_damaged_value_is_counted", CountsNoDamage),
    ("test_a_damaged_value_is_counted", NamesWhatIsDamaged),
    ("test_a_damaged_value_is_counted", ReplacesDamageByZeros),
    ("test_reading_changes_nothing", CountsItsReadsInTheStore),
    ("test_lookup_finds_the_texts_that_are_stored", ReturnsNoneForAMiss),
    ("test_lookup_finds_the_texts_that_are_stored", ReturnsEverything),
    ("test_lookup_finds_the_texts_that_are_stored", ReturnsADict),
    ("test_every_order_and_subset_gets_the_right_vectors", KeepsTheOrderOfTheStore),
    ("test_a_full_batch_is_looked_up", LooksUpNineHundred),
    ("test_texts_that_look_alike_are_different", FoldsCase),
    ("test_texts_that_look_alike_are_different", StripsTexts),
    ("test_texts_that_look_alike_are_different", NormalizesUnicode),
    ("test_texts_that_look_alike_are_different", CutsAtNul),
    ("test_texts_that_look_alike_are_different", CutsLongTexts),
    ("test_texts_that_look_alike_are_different", ReadsNumbers),
    ("test_texts_that_look_alike_are_different", TakesATextForAPattern),
    ("test_texts_that_look_alike_are_different", TakesATextForAKey),
    ("test_any_text_gets_its_own_vector_or_none", ReplacesSlashes),
    ("test_what_is_handed_in_is_left_alone", SortsTheList),
    ("test_a_later_call_leaves_earlier_vectors_alone", UsesOneBuffer),
    ("test_threads_get_their_own_vectors", HasOnePlaceForTexts),
    ("test_special_values_come_back_exactly", ReadsSixDecimals),
    ("test_special_values_come_back_exactly", NormalizesVectors),
    ("test_scan_yields_every_text_with_its_vector", TakesTheFirstRowForAHeader),
    ("test_scan_yields_every_text_with_its_vector", YieldsOneBuffer),
    ("test_scan_yields_the_same_order_each_time", YieldsAnotherOrderEachTime),
    ("test_scan_yields_parts_of_bounded_size", YieldsOnePart),
    ("test_a_scan_that_was_abandoned_changes_no_later_scan", HasOneCursor),
    ("test_count_agrees_with_scan", CountsBytes),
    ("test_lookup_finds_what_scan_yields", EndsAScanToLookUp),
    ("test_close_twice_does_nothing", ClosesOnceOnly),
    ("test_close_twice_does_nothing", ClosesWhatItNeverOpened),
    ("test_a_closed_importer_returns_no_wrong_vector", ReadsZerosAfterClose),
    ("test_a_forked_child_reads_the_store_or_is_refused", FindsNothingInAForkedChild),
    ("test_a_forked_child_takes_nothing_from_its_parent", EndsItsParentsConnection),
    ("test_other_processes_read_the_store", NamesItsSourceByHash),
    ("test_a_pickled_importer_reads_the_store_or_is_refused", LosesItsPathInAPickle),
    ("test_a_store_that_stalls_is_left_by_the_deadline", TakesALateReply),
]


class ImporterContractRun(ImporterContract):
    examples = 20
    secrets = ("hunter2",)

    def __init__(self, broken: Callable[..., Any], folder: Path) -> None:
        self.broken = broken
        self.folder = folder
        self.made = 0

    def make(self, texts: Any, vectors: Any) -> Any:
        self.made += 1
        path = self.folder / f"{self.made}.jsonl"
        write_records(path, texts, vectors)
        return self.broken(path=path, password="hunter2")

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(self.broken, {"path": str(importer.path)})

    def missing(self) -> tuple[Any, str]:
        path = self.folder / "missing"
        return self.broken(path=path, password="hunter2"), str(path)

    def damage(self, importer: Any, text: str) -> None:
        damage_record(importer.path, text)

    def snapshot(self, importer: Any) -> object:
        return {file.name: file.read_bytes() for file in self.folder.iterdir()}

    @contextmanager
    def stall(self, importer: Any) -> Iterator[None]:
        importer.stalled.set()
        yield
        importer.stalled.clear()


@pytest.mark.parametrize(("name", "broken"), BROKEN_IMPORTERS, ids=lambda value: getattr(value, "__name__", value))
def test_the_importer_contract_catches(name: str, broken: Callable[..., Any], tmp_path: Path) -> None:
    assert is_failing(getattr(ImporterContractRun(broken, tmp_path), name)), f"{name} lets {broken.__name__} pass"


def test_every_test_of_the_importer_contract_catches_something() -> None:
    own = {"test_no_standard_test_is_replaced"}
    assert {name for name, _ in BROKEN_IMPORTERS} | own == set(ImporterContract.standard_tests)


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "test_every_order_and_subset_gets_the_right_vectors",
            KeepsTheOrderOfTheStore,
            r'lookup: the vector of "Text \d+ of several\." is that of another text: "',
        ),
        (
            "test_texts_that_look_alike_are_different",
            FoldsCase,
            'lookup returned a text that is not in the store: "text"|is that of another text|',
        ),
        ("test_options_can_be_written_in_toml", HasAnOptionTask, "must not have an option named task"),
        ("test_a_missing_store_is_named_by_check", ReadsInItsConstructor, "the constructor raised SourceError"),
        ("test_a_missing_store_is_an_error_and_no_miss", TakesMissingForEmpty, "lookup must raise an error"),
        ("test_scan_yields_parts_of_bounded_size", YieldsOnePart, "scan yielded 6,000 texts in one part; yield at"),
        ("test_a_full_batch_is_looked_up", LooksUpNineHundred, "lookup of 1,024 texts left out 25 texts of 1024"),
    ],
)
def test_the_message_says_what_is_wrong(name: str, broken: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(ImporterContractRun(broken, tmp_path), name)()


def test_a_contract_without_make_says_so() -> None:
    with pytest.raises(NotImplementedError, match="must define how to write a store"):
        type("TestNothing", (ImporterContract,), {})().test_the_methods_are_there()


def test_a_standard_test_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="test_a_full_batch_is_looked_up"):
        type("TestMine", (ImporterContract,), {"test_a_full_batch_is_looked_up": None})
