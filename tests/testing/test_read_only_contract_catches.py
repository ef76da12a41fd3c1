"""The conformance kit finds bugs of read-only backends: every standard test catches one that is broken in one way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contract_runs import Rendezvous, is_failing
from embedonce_slate import KnowsWhatItHasWritten, SlateBackend, damage_slate, write_slate
from read_only_stores import ReadOnlyDict

from embedonce.contracts import StoredSize
from embedonce.errors import TierError
from embedonce.testing import ReadOnlyContract, Recipe

# --- broken backends --------------------------------------------------------------------------


class DoesNotSayThatItIsReadOnly(SlateBackend):
    """Does not declare that it is read-only."""

    capabilities = replace(SlateBackend.capabilities, read_only=False)


class SaysThatItDeletes(SlateBackend):
    """Declares `delete`, although nothing can be removed from its file."""

    capabilities = replace(SlateBackend.capabilities, delete=True)

    def delete_many(self, keys):
        pass


class CannotCount(SlateBackend):
    """Declares `count` but has no such method."""

    count = None


class ReturnsNoneForMisses(SlateBackend):
    """Returns None for a key that is not there."""

    def get_many(self, keys):
        return dict.fromkeys(keys) | super().get_many(keys)


class FailsOnAnEmptyFile(SlateBackend):
    """Reads the first key of its file without looking whether there is one."""

    def get_many(self, keys):
        assert next(iter(self.index))
        return super().get_many(keys)


class LeavesOutTheLast(SlateBackend):
    """Searches up to the last row of its file, without this row."""

    def get_many(self, keys):
        last = list(self.index)[-1]
        return {key: value for key, value in super().get_many(keys).items() if key != last}


class ShiftsByRepeatedKeys(SlateBackend):
    """Matches rows to keys by position, so that a repeated key shifts the rest."""

    def get_many(self, keys):
        found = super().get_many(keys)
        rows = [found.get(key) for key in dict.fromkeys(keys)]
        return {key: value for key, value in zip(keys, rows, strict=False) if value is not None}


class ReturnsWholeBlocks(SlateBackend):
    """Returns all rows of the block in which it has found a key."""

    def get_many(self, keys):
        return super().get_many(list(self.index) if any(key in self.index for key in keys) else keys)


class LimitsItsAnswer(SlateBackend):
    """Returns at most 400 rows, although it declares larger batches."""

    def get_many(self, keys):
        return super().get_many(list(keys)[:400])


class LosesWhatIsTooMuch(SlateBackend):
    """Leaves out the keys beyond its largest batch, as if they were missing."""

    def get_many(self, keys):
        return super().get_many(list(keys)[:500])


class EndsAtANulByte(SlateBackend):
    """Stores texts that end at a NUL byte."""

    def read(self, key):
        return super().read(key).partition(b"\0")[0]


class SortsTheKeysItGets(SlateBackend):
    """Sorts the list of keys that it is given."""

    def get_many(self, keys):
        if isinstance(keys, list):
            keys.sort()
        return super().get_many(keys)


class SearchesByPrefix(SlateBackend):
    """Compares only the first bytes of a digest."""

    def get_many(self, keys):
        rows = {key[:40]: key for key in self.index}
        return {key: self.read(rows[key[:40]]) for key in keys if key[:40] in rows}


class CountsEverything(SlateBackend):
    """Counts all keys, whatever the prefix."""

    def count(self, prefix):
        return len(self.index)


class ListsByPattern(SlateBackend):
    """Lists the keys of one scope, whatever the prefix."""

    def scan(self, prefix):
        return iter([key for key in self.index if key.startswith(prefix[:20])])


class ListsOnePage(SlateBackend):
    """Lists one page of 1000 keys."""

    def scan(self, prefix):
        return iter(list(super().scan(prefix))[:1000])


class GetRaisesOnAMiss(SlateBackend):
    """Raises KeyError if the key of `get` is not there."""

    def get(self, key):
        return self.read(key)


class MeasuresTheWholeFile(SlateBackend):
    """Returns the size of its file, whatever the prefix."""

    def measure(self, prefix):
        return StoredSize(bytes=Path(self.path).stat().st_size)


class NotesItsReads(SlateBackend):
    """Writes a note into its file when it is read."""

    def get_many(self, keys):
        with Path(self.path).open("ab") as file:
            file.write(b".")
        return super().get_many(keys)


class HasNoVectorsForAChain(SlateBackend):
    """Returns frames as another type, which a test of single values would have to look for."""

    def get_many(self, keys):
        return {key: value[:-1] if len(value) > 64 else value for key, value in super().get_many(keys).items()}


class ClosesOnlyOnce(SlateBackend):
    """Closes its file again in a second call."""

    def close(self):
        os.close(self.file)


class AnswersAfterClose(SlateBackend):
    """Returns nothing after it was closed, as if all keys were missing."""

    def get_many(self, keys):
        return {} if self.file < 0 else super().get_many(keys)


class ForgetsItsFile(SlateBackend):
    """Removes its file when it is closed."""

    def close(self):
        super().close()
        Path(self.path).unlink(missing_ok=True)


_FILES: dict[str, int] = {}


class SharesOneFile(SlateBackend):
    """Shares one open file among all clients of a process, and closes it with the first of them."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        shared = _FILES.setdefault(path, self.file)
        if shared != self.file:
            os.close(self.file)
        self.file = shared

    def check_open(self):
        if self.path not in _FILES:
            raise ValueError("the file is closed")

    def close(self):
        if _FILES.pop(self.path, None) is not None:
            os.close(self.file)


class MixesThreads(SlateBackend):
    """Keeps the keys of a call in an attribute, so that another thread changes them."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        self.meet = Rendezvous()

    def get_many(self, keys):
        self.keys = keys
        self.meet()
        return super().get_many(self.keys)


class ReadsInItsParentOnly(SlateBackend):
    """Returns nothing in a forked child."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        self.process = os.getpid()

    def get_many(self, keys):
        return super().get_many(keys) if os.getpid() == self.process else {}


class EndsWithItsParent(SlateBackend):
    """Truncates its file when it is closed, so that a forked child loses it."""

    def close(self):
        if self.file >= 0:
            os.truncate(self.path, self.start)
        super().close()


class AnswersInAForkedChild(SlateBackend):
    """Declares that it does not work in a forked child, but answers there."""

    capabilities = replace(SlateBackend.capabilities, fork=False)


class FailsAsAWhole(SlateBackend):
    """Raises an error if one value is damaged."""

    def read(self, key):
        value = super().read(key)
        if not value:
            raise ValueError("a value is damaged")
        return value


class HidesDamage(SlateBackend):
    """Leaves out a damaged value, as if it were missing."""

    def get_many(self, keys):
        return {key: value for key, value in super().get_many(keys).items() if value}


class VerifiesInSilence(SlateBackend):
    """Returns nothing when it has verified its file."""

    def verify(self):
        super().verify()


class VerifiesNothing(SlateBackend):
    """Says that its file is intact without reading it."""

    def verify(self):
        return "all is well"


class RaisesAnyError(SlateBackend):
    """Raises an error of another type when its file is damaged."""

    def verify(self):
        try:
            return super().verify()
        except TierError as error:
            raise ValueError(str(error)) from error


class _InThisProcess(ReadOnlyDict):
    """A read-only backend in this process. The subclasses are broken."""

    form: Any = "entries"

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__(items, scope="process", holds=self.form, get=True)


class HasNoCards(_InThisProcess):
    """Leaves out entries without a vector, and so all space cards."""

    def get_many(self, keys):
        return {key: entry for key, entry in super().get_many(keys).items() if entry.vector.size}


class HandsOutItsArrays(_InThisProcess):
    """Returns arrays that the caller can write to."""

    def get_many(self, keys):
        return {key: entry._replace(vector=entry.vector.copy()) for key, entry in super().get_many(keys).items()}


class LosesTheCost(_InThisProcess):
    """Does not keep what it took to compute an entry."""

    def get_many(self, keys):
        return {key: entry._replace(tokens=None) for key, entry in super().get_many(keys).items()}


class TakesFramesForText(_InThisProcess):
    """Reads frames as text, and leaves out the bytes that are not text."""

    form = "either"

    def get_many(self, keys):
        found = super().get_many(keys)
        return {k: v.decode(errors="ignore").encode() if isinstance(v, bytes) else v for k, v in found.items()}


class _ShiftingTwin:
    def __init__(self, path: str) -> None:
        self._backend = ShiftsByRepeatedKeys(path=path)

    async def get_many(self, keys):
        return self._backend.get_many(keys)

    async def close(self):
        self._backend.close()


class TwinShiftsReplies(SlateBackend):
    """Has an async client that matches rows to keys by position."""

    capabilities = replace(SlateBackend.capabilities, twin=True)

    def twin(self):
        return _ShiftingTwin(self.path)


BROKEN_READ_ONLY_BACKENDS: list[tuple[str, Any]] = [
    ("test_it_declares_that_it_is_read_only", DoesNotSayThatItIsReadOnly),
    ("test_it_declares_that_it_is_read_only", SaysThatItDeletes),
    ("test_declared_extras_are_there", CannotCount),
    ("test_an_empty_store_has_nothing", FailsOnAnEmptyFile),
    ("test_a_miss_is_absent", ReturnsNoneForMisses),
    ("test_one_entry_comes_back", LeavesOutTheLast),
    ("test_a_key_asked_twice_comes_once", ShiftsByRepeatedKeys),
    ("test_only_what_was_asked_comes_back", ReturnsWholeBlocks),
    ("test_a_full_batch_comes_back", LimitsItsAnswer),
    ("test_one_more_than_a_full_batch_is_right_or_refused", LosesWhatIsTooMuch),
    ("test_what_is_handed_in_is_left_alone", SortsTheKeysItGets),
    ("test_what_is_handed_out_cannot_change_the_store", HandsOutItsArrays),
    ("test_special_values_come_back_exactly", EndsAtANulByte),
    ("test_special_values_come_back_exactly", LosesTheCost),
    ("test_a_space_card_comes_back", HasNoCards),
    ("test_frames_come_back_exactly", TakesFramesForText),
    ("test_keys_that_look_alike_are_different", SearchesByPrefix),
    ("test_any_store_answers_as_a_dict", CountsEverything),
    ("test_get_agrees_with_get_many", GetRaisesOnAMiss),
    ("test_scan_finds_what_starts_with_the_prefix", ListsByPattern),
    ("test_a_long_scan_leaves_nothing_out", ListsOnePage),
    ("test_measure_tells_the_size_of_a_scope", MeasuresTheWholeFile),
    ("test_reads_write_nothing", NotesItsReads),
    ("test_a_chain_reads_it_and_writes_nothing_to_it", HasNoVectorsForAChain),
    ("test_close_twice_does_nothing", ClosesOnlyOnce),
    ("test_use_after_close_raises", AnswersAfterClose),
    ("test_what_it_holds_is_there_when_opened_again", ForgetsItsFile),
    ("test_clients_close_alone", SharesOneFile),
    ("test_threads_read_at_once", MixesThreads),
    ("test_processes_read_at_once", KnowsWhatItHasWritten),
    ("test_a_forked_child_reads_the_store", ReadsInItsParentOnly),
    ("test_a_forked_child_goes_on_without_its_parent", EndsWithItsParent),
    ("test_a_forked_child_is_refused", AnswersInAForkedChild),
    ("test_the_twin_reads_the_store", TwinShiftsReplies),
    ("test_a_damaged_value_is_corrupt_alone", FailsAsAWhole),
    ("test_a_damaged_value_is_corrupt_alone", HidesDamage),
    ("test_verify_accepts_an_intact_store", VerifiesInSilence),
    ("test_verify_finds_damage", VerifiesNothing),
    ("test_verify_finds_damage", RaisesAnyError),
]


class ReadOnlyRun(ReadOnlyContract):
    """The contract of a broken read-only backend, with every optional method, so that no test is skipped."""

    examples = 20

    def __init__(self, broken: Any, folder: Path) -> None:
        self.broken = broken
        self.path = folder
        self.number = 0

    def make(self, items: Mapping[str, Any]) -> Any:
        if issubclass(self.broken, ReadOnlyDict):
            return self.broken(items)
        self.number += 1
        path = self.path / f"{self.number}.slate"
        write_slate(path, items)
        return self.broken(path=str(path))

    def reopen(self, backend: Any) -> Any:
        return self.broken(path=backend.path)

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(self.broken, {"path": backend.path})

    def damage(self, backend: Any, name: str) -> None:
        damage_slate(Path(backend.path), name)

    def folder(self, backend: Any) -> Path:
        return Path(backend.path)


@pytest.mark.parametrize(
    ("name", "broken"), BROKEN_READ_ONLY_BACKENDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_read_only_contract_catches(name: str, broken: Any, tmp_path: Path) -> None:
    assert is_failing(getattr(ReadOnlyRun(broken, tmp_path), name)), f"{name} lets {broken.__name__} pass"


def test_every_test_of_the_read_only_contract_catches_something() -> None:
    own = {"test_no_standard_test_is_replaced"}
    assert {name for name, _ in BROKEN_READ_ONLY_BACKENDS} | own == set(ReadOnlyContract.standard_tests)


def test_a_read_only_backend_is_referred_to_its_own_contract(tmp_path: Path) -> None:
    class Wrong(ReadOnlyRun):
        """A backend that says nothing about being read-only."""

    with pytest.raises(AssertionError, match=r"capabilities\.read_only must be True.*BackendContract"):
        Wrong(DoesNotSayThatItIsReadOnly, tmp_path).test_it_declares_that_it_is_read_only()


def test_a_store_must_be_made_with_its_items() -> None:
    class Nothing(ReadOnlyContract):
        """A contract without the one method that it needs."""

    with pytest.raises(NotImplementedError, match=r"Nothing must define how to make a store: def make"):
        Nothing().test_one_entry_comes_back()
