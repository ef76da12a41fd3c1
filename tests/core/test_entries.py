"""Entries that were read together stay in one block, which has the same vectors as the single frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedonce import Cache, Incomplete, Tier
from embedonce._engine.checks import check_entries
from embedonce.contracts import Capabilities
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import (
    MAX_SECONDS,
    MAX_TOKENS,
    Block,
    Columns,
    Dtype,
    Entries,
    Entry,
    Work,
    decode_frames,
    encode_frames,
    freeze,
    round_vectors,
    sum_costs,
)
from embedonce_backends.memory import MemoryBackend

NOW = 1_750_000_000.0
MADE = NOW - 100
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{number:064x}"


def rows_of(count: int, dimension: int = 4, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def block_of(numbers: Sequence[int], dimension: int = 4, **more: Any) -> Block:
    count = len(numbers)
    rows = np.stack([rows_of(1, dimension, number)[0] for number in numbers])
    created, expires = np.full(count, MADE), np.full(count, math.inf)
    return Block([key_of(n) for n in numbers], rows, **{"created": created, "expires": expires, **more})


def vector_of(number: int, dimension: int = 4) -> NDArray[np.float32]:
    return rows_of(1, dimension, number)[0]


# --- frames in a batch ------------------------------------------------------------------------

HARMS = (
    "none",
    "flipped",
    "echo",
    "cut",
    "expired",
    "expiring",
    "nan",
    "metadata",
    "cost",
    "coarse",
    "wide",
    "foreign",
)


def make_frame(harm: str, number: int, dtype: Dtype, place: int) -> bytes:
    """Return the frame of key ``number``. ``harm`` says what is wrong with the frame."""
    key = key_of(number)
    row = round_vectors(rows_of(1, 9 if harm == "wide" else 8, number), dtype)[0]
    entry = Entry(freeze(row), MADE, dtype=dtype)
    if harm in ("expired", "expiring"):
        entry = entry._replace(expires=NOW if harm == "expired" else NOW + 1)
    if harm == "metadata":
        entry = entry._replace(metadata={"number": number})
    if harm == "cost":
        entry = entry._replace(tokens=number, seconds=None if number % 3 else 0.5)
    if harm == "coarse":
        entry = entry._replace(dtype="int8")
    frame = encode_frames({key_of(number + 1000) if harm == "echo" else key: entry})[
        key_of(number + 1000) if harm == "echo" else key
    ]
    if harm == "flipped":
        at = place % (8 * len(frame))
        changed = bytearray(frame)
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed)
    if harm == "cut":
        return frame[: place % len(frame)]
    if harm == "nan":
        from xxhash import xxh3_64_intdigest

        body = frame[16:-4] + np.float32(math.nan).tobytes()
        return frame[:8] + xxh3_64_intdigest(body, int.from_bytes(frame[:8], "little")).to_bytes(8, "little") + body
    return b"no frame" if harm == "foreign" else frame


@settings(max_examples=200)
@given(
    made=st.lists(
        st.tuples(
            st.sampled_from(("none", "none", "none", "none", *HARMS)), st.sampled_from(DTYPES), st.integers(0, 5000)
        ),
        max_size=40,
    ),
    one=st.none() | st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    dimensions=st.sampled_from([None, 8]),
    data=st.data(),
)
def test_a_batch_gives_the_same_results_as_single_frames(
    made: list[tuple[str, Dtype, int]], one: Dtype | None, dtype: Dtype, dimensions: int | None, data: st.DataObject
) -> None:
    frames = {key_of(n): make_frame(harm, n, one or kind, place) for n, (harm, kind, place) in enumerate(made)}
    together = decode_frames(frames, now=NOW, dtype=dtype, dimensions=dimensions)
    alone = {k: decode_frames({k: f}, now=NOW, dtype=dtype, dimensions=dimensions) for k, f in frames.items()}
    assert sorted(together.corrupt) == [key for key, decoded in alone.items() if decoded.corrupt]
    assert sorted(together.missed) == [key for key, decoded in alone.items() if decoded.missed]
    good = {key: decoded.entries[key] for key, decoded in alone.items() if decoded.entries}
    assert together.entries.keys() == good.keys()
    size = next((entry.vector.size for entry in good.values()), 8)
    if len({entry.vector.size for entry in good.values()}) > 1:
        with pytest.raises(Incomplete):
            together.entries.matrix(list(good), None)
    else:
        asked = data.draw(st.lists(st.sampled_from(sorted(good)), max_size=60) if good else st.just([]))
        for keys in (list(good), asked):
            matrix = together.entries.matrix(keys, size)
            assert matrix.shape == (len(keys), size)
            assert matrix.tobytes() == b"".join(good[key].vector.tobytes() for key in keys)
    for key, entry in together.entries.as_dict().items():
        assert entry[1:] == good[key][1:]
        assert entry.vector.tobytes() == good[key].vector.tobytes()


@pytest.mark.parametrize("harm", ["flipped", "echo", "nan", "expired", "coarse"])
@pytest.mark.parametrize("at", [0, 25, 49])
def test_one_invalid_frame_leaves_the_others_in_one_block(harm: str, at: int) -> None:
    frames = {key_of(n): make_frame(harm if n == at else "none", n, "float32", 8 * 70) for n in range(50)}
    decoded = decode_frames(frames, now=NOW, dimensions=8)
    bad = decoded.missed if harm in ("expired", "coarse") else decoded.corrupt
    assert bad == [key_of(at)]
    (block,) = decoded.entries.blocks
    assert block.keys == [key_of(n) for n in range(50) if n != at]


# --- the mapping ------------------------------------------------------------------------------


def make_mixed_entries() -> tuple[Entries, dict[str, NDArray[np.float32]]]:
    """Return eight entries, and their vectors by key. Five entries are in two blocks, and three are in no block."""
    loose = {key_of(n): Entry(freeze(vector_of(n)), MADE) for n in (3, 7, 11)}
    entries = Entries(loose, [block_of([5, 1, 9]), block_of([2, 0])])
    return entries, {key_of(n): vector_of(n) for n in (0, 1, 2, 3, 5, 7, 9, 11)}


@given(
    numbers=st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 9, 11]), max_size=20), made=st.lists(st.sampled_from([1, 2, 7]))
)
def test_the_matrix_has_the_order_of_the_requested_keys(numbers: list[int], made: list[int]) -> None:
    entries, vectors = make_mixed_entries()
    for number in made:  # reading a single entry must change nothing
        assert entries[key_of(number)].vector.tobytes() == vectors[key_of(number)].tobytes()
    keys = [key_of(number) for number in numbers]
    assert entries.matrix(keys, 4).tolist() == [vectors[key].tolist() for key in keys]
    assert entries.matrix(keys, 4).shape == (len(keys), 4)


@pytest.mark.parametrize("blocks", [[[5, 1, 9, 2]], [[5, 1], [9, 2]]])
def test_the_same_keys_in_a_different_order_give_a_different_matrix(blocks: list[list[int]]) -> None:
    entries = Entries(blocks=[block_of(numbers) for numbers in blocks])
    for numbers in ([5, 1, 9, 2], [2, 9, 1, 5], [5, 5, 5, 5]):
        matrix = entries.matrix([key_of(number) for number in numbers], 4)
        assert matrix.tolist() == [vector_of(number).tolist() for number in numbers]


def test_entries_are_a_mutable_mapping() -> None:
    entries, vectors = make_mixed_entries()
    assert len(entries) == len(vectors) == len(list(entries))
    assert entries.sizes() == {4: 8}
    assert entries.lacking([key_of(4), key_of(5)]) == [key_of(4)]
    assert key_of(5) in entries
    assert key_of(4) not in entries
    assert entries == entries.as_dict()
    assert entries.loose().keys() == {key_of(3), key_of(7), key_of(11)}
    with pytest.raises(KeyError):
        entries[key_of(4)]
    with pytest.raises(KeyError):
        entries.matrix([key_of(4)], 4)
    replaced = Entry(freeze([1, 2, 3, 4]), MADE)
    entries[key_of(5)] = replaced
    assert entries.matrix([key_of(1), key_of(5)], 4).tolist() == [vectors[key_of(1)].tolist(), [1, 2, 3, 4]]
    del entries[key_of(9)]
    assert entries.keys() == vectors.keys() - {key_of(9)}
    assert entries.matrix([key_of(2), key_of(5)], 4).tolist() == [vectors[key_of(2)].tolist(), [1, 2, 3, 4]]
    assert "8" not in repr(entries)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from("abcd"), min_size=1)), max_size=6))
def test_all_entries_are_those_that_were_added_last(additions: list[tuple[bool, set[str]]]) -> None:
    entries = Entries()
    expected: dict[str, float] = {}
    for number, (is_block, names) in enumerate(additions):
        keys, values = sorted(names), np.full((len(names), 2), number, np.float32)
        if is_block:
            entries.add_block(Block(keys, values, np.zeros(len(keys)), np.full(len(keys), math.inf)))
        else:
            entries.add({key: Entry(row, 0.0) for key, row in zip(keys, values, strict=True)})
        expected.update(dict.fromkeys(keys, float(number)))
    assert {key: entry.vector[0] for key, entry in entries.as_dict().items()} == expected
    assert list(entries.as_dict()) == list(entries)


def test_vectors_and_matrices_neither_keep_the_batch_alive_nor_change_it() -> None:
    frames = encode_frames({key_of(n): Entry(freeze(row), MADE) for n, row in enumerate(rows_of(50))})
    entries = decode_frames(frames, now=NOW).entries
    assert len(entries.blocks) == 1
    keys = list(frames)
    matrix = entries.matrix(keys, 4)
    before = matrix.copy()
    assert matrix.flags.c_contiguous
    matrix[:] = 0
    assert (entries.matrix(keys, 4) == before).all()
    for key in keys:
        vector = entries[key].vector
        assert type(vector.base) is bytes
        assert len(vector.base) == 4 * 4
        with pytest.raises(ValueError, match="WRITEABLE"):
            vector.setflags(write=True)
        assert entries[key] is entries[key]


def test_rows_of_different_dimensions_are_never_joined() -> None:
    entries = Entries(blocks=[block_of([1, 2], 4), block_of([3, 4], 8)])
    assert entries.sizes() == {4: 2, 8: 2}
    with pytest.raises(Incomplete, match="different dimensions"):
        entries.matrix([key_of(1), key_of(3)], None)
    for number in (3, 4):
        del entries[key_of(number)]
    assert entries.sizes() == {4: 2}
    assert entries.matrix([key_of(2), key_of(1)], 4).tolist() == [vector_of(2).tolist(), vector_of(1).tolist()]
    with pytest.raises(KeyError):
        entries.matrix([key_of(3)], 4)
    assert Entries().matrix([], 7).shape == (0, 7)


@pytest.mark.parametrize(
    "columns",
    [
        {"created": np.zeros(3)},
        {"expires": np.zeros(1)},
        {"metadata": [None]},
        {"tokens": np.zeros(3, np.int64)},
        {"seconds": np.zeros(1)},
    ],
)
def test_a_block_with_columns_of_different_lengths_is_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="2 keys"):
        block_of([1, 2], **columns)
    with pytest.raises(ValueError, match="2 keys"):
        Block([key_of(1), key_of(2)], np.zeros(2, np.float32), np.zeros(2), np.zeros(2))


# --- costs ------------------------------------------------------------------------------------

TOKENS, SECONDS = np.array([5, -1, 0, MAX_TOKENS]), np.array([0.5, math.nan, 0.0, MAX_SECONDS])
COSTS = [(5, 0.5), (None, None), (0, 0.0), (MAX_TOKENS, MAX_SECONDS)]


def costs_of(entries: Mapping[str, Entry]) -> list[tuple[int | None, float | None]]:
    return [(entry.tokens, entry.seconds) for entry in entries.values()]


def test_the_entries_of_a_block_have_its_costs() -> None:
    block = block_of(range(4), tokens=TOKENS, seconds=SECONDS)
    assert costs_of(block.entries()) == COSTS
    assert {type(entry.tokens) for entry in block.entries().values()} == {int, type(None)}
    assert costs_of(block_of(range(4), tokens=TOKENS).entries()) == [(tokens, None) for tokens, _ in COSTS]
    assert costs_of(block_of(range(4), seconds=SECONDS).entries()) == [(None, seconds) for _, seconds in COSTS]
    assert costs_of(block_of(range(4)).entries()) == [(None, None)] * 4


def test_the_chosen_rows_of_a_block_keep_their_costs() -> None:
    chosen = np.array([True, False, False, True])
    assert costs_of(block_of(range(4), tokens=TOKENS, seconds=SECONDS).where(chosen).entries()) == [COSTS[0], COSTS[3]]
    assert costs_of(block_of(range(4), seconds=SECONDS).where(chosen).entries()) == [(None, 0.5), (None, MAX_SECONDS)]
    assert block_of(range(4)).where(chosen).tokens is None


def sum_up(entries: Entries) -> Work:
    return sum_costs(entries.list_costs())


def test_unknown_costs_are_counted_and_not_added_up() -> None:
    whole = Work(4, 5 + MAX_TOKENS, 0.5 + MAX_SECONDS, 1, 1)
    block = block_of(range(4), tokens=TOKENS, seconds=SECONDS)
    assert sum_up(Entries(blocks=[block])) == whole
    assert sum_up(Entries(block.entries())) == whole
    assert sum_up(Entries(block.entries(), columns=Columns.of(block.entries().values()))) == whole
    assert sum_up(Entries(blocks=[block_of(range(4), tokens=TOKENS)])) == Work(4, 5 + MAX_TOKENS, 0.0, 1, 4)
    assert sum_up(Entries(blocks=[block_of(range(4))])) == Work(4, 0, 0.0, 4, 4)
    assert sum_up(Entries()) == sum_costs([]) == Work()
    assert [type(part) for part in sum_up(Entries(blocks=[block]))] == [int, int, float, int, int]


def test_many_columns_are_added_up_together() -> None:
    block = block_of(range(4), tokens=TOKENS, seconds=SECONDS)
    columns = [*Entries(blocks=[block]).list_costs(), *Entries(block.entries()).list_costs()] * 3
    assert sum_costs(columns) == Work(24, 6 * (5 + MAX_TOKENS), 6 * (0.5 + MAX_SECONDS), 6, 6)


def test_the_costs_of_blocks_and_single_entries_are_added_up() -> None:
    loose = {key_of(7): Entry(freeze(vector_of(7)), MADE, tokens=3), key_of(8): Entry(freeze(vector_of(8)), MADE)}
    entries = Entries(loose, [block_of(range(4), tokens=TOKENS), block_of([5], seconds=np.array([2.0]))])
    assert sum_up(entries) == Work(7, 5 + MAX_TOKENS + 3, 2.0, 1 + 1 + 1, 4 + 2)


def test_columns_are_used_only_while_they_describe_all_entries() -> None:
    given = {key_of(n): Entry(freeze(vector_of(n)), MADE, tokens=n, seconds=0.5) for n in range(4)}
    more = {key_of(9): Entry(freeze(vector_of(9)), MADE, tokens=90, seconds=0.5)}
    changes: dict[str, tuple[Callable[[Entries], object], int]] = {
        "none": (lambda entries: None, 6),
        "set": (lambda entries: entries.update(more), 96),
        "replace": (lambda entries: entries.update({key_of(3): more[key_of(9)]}), 93),
        "delete": (lambda entries: entries.pop(key_of(3)), 3),
        "add": (lambda entries: entries.add(more), 96),
        "add entries": (lambda entries: entries.add(Entries(more, columns=Columns.of(more.values()))), 96),
        "add a block": (lambda entries: entries.add_block(block_of([9], tokens=np.array([90]))), 96),
        "clear": (lambda entries: entries.clear(), 0),
    }
    for name, (change, tokens) in changes.items():
        entries = Entries(given, columns=Columns.of(given.values()))
        change(entries)
        assert sum_up(entries).tokens == tokens, name
        assert sum_up(entries).texts == len(entries), name
        keys = list(entries)
        assert entries.matrix(keys, 4).tolist() == [entries[key].vector.tolist() for key in keys], name
    empty = Entries()
    empty.add(Entries(given, columns=Columns.of(given.values())))
    assert sum_up(empty).tokens == 6
    assert empty.matrix(list(given), 4).tolist() == [vector_of(n).tolist() for n in range(4)]


# --- blocks of a backend ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "corrupt", "missed"),
    [
        ("none", [], []),
        ("nan", [2], []),
        ("infinite", [2], []),
        ("expired", [], [2]),
        ("dimension", [0, 1, 2, 3], []),
        ("coarse", [], [0, 1, 2, 3]),
    ],
)
def test_the_block_of_a_backend_is_checked(change: str, corrupt: list[int], missed: list[int]) -> None:
    block = block_of(range(4), 5 if change == "dimension" else 4, dtype="int8" if change == "coarse" else "float32")
    if change in ("nan", "infinite"):
        block.values[2, 1] = math.nan if change == "nan" else -math.inf
    if change == "expired":
        block.expires[2] = NOW
    decoded = check_entries(Entries(blocks=[block]), now=NOW, dtype="float32", dimensions=4)
    assert decoded.corrupt == [key_of(n) for n in corrupt]
    assert decoded.missed == [key_of(n) for n in missed]
    left = [n for n in range(4) if n not in (*corrupt, *missed)]
    assert decoded.entries.keys() == {key_of(n) for n in left}
    assert decoded.entries.matrix([key_of(n) for n in left], 4).tolist() == [vector_of(n).tolist() for n in left]


INVALID_COSTS: dict[str, dict[str, Any]] = {
    "negative tokens": {"tokens": -2},
    "too many tokens": {"tokens": MAX_TOKENS + 1},
    "negative seconds": {"seconds": -0.5},
    "infinite seconds": {"seconds": math.inf},
    "minus infinite seconds": {"seconds": -math.inf},
    "too many seconds": {"seconds": 2 * MAX_SECONDS},
}


@pytest.mark.parametrize("name", INVALID_COSTS)
def test_a_row_with_an_invalid_cost_is_corrupt_alone(name: str) -> None:
    columns = {"tokens": np.array([5, -1, 0, 7]), "seconds": np.array([0.5, math.nan, 0.0, 7.0])}
    for column, value in INVALID_COSTS[name].items():
        columns[column][2] = value
    decoded = check_entries(Entries(blocks=[block_of(range(4), **columns)]), now=NOW, dtype="float32", dimensions=4)
    assert (decoded.corrupt, decoded.missed) == ([key_of(2)], [])
    assert costs_of(decoded.entries) == [(5, 0.5), (None, None), (7, 7.0)]
    assert encode_frames(decoded.entries).keys() == decoded.entries.keys()


@pytest.mark.parametrize(
    "cost",
    [
        *INVALID_COSTS.values(),
        {"tokens": 1.0},
        {"tokens": True},
        {"tokens": "7"},
        {"tokens": np.int64(7)},
        {"seconds": math.nan},
        {"seconds": "7"},
        {"seconds": True},
    ],
    ids=str,
)
def test_an_entry_with_an_invalid_cost_is_corrupt_alone(cost: dict[str, Any]) -> None:
    entries = {key_of(n): Entry(freeze(vector_of(n)), MADE, tokens=n, seconds=0.5) for n in range(4)}
    entries[key_of(2)] = entries[key_of(2)]._replace(**cost)
    decoded = check_entries(entries, now=NOW, dtype="float32", dimensions=4)
    assert (decoded.corrupt, decoded.missed) == ([key_of(2)], [])
    assert costs_of(decoded.entries) == [(0, 0.5), (1, 0.5), (3, 0.5)]


def test_valid_costs_of_a_block_are_kept_whatever_their_type() -> None:
    for tokens, seconds in ((TOKENS, SECONDS), (TOKENS.astype(">i8"), SECONDS.astype(">f8"))):
        block = block_of(range(4), tokens=tokens, seconds=seconds)
        decoded = check_entries(Entries(blocks=[block]), now=NOW, dtype="float32", dimensions=4)
        assert costs_of(decoded.entries) == COSTS


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_block_of_a_backend_is_rounded(dtype: Dtype) -> None:
    decoded = check_entries(Entries(blocks=[block_of(range(4))]), now=NOW, dtype=dtype, dimensions=4)
    rounded = round_vectors([vector_of(n) for n in range(4)], dtype)
    assert [decoded.entries[key_of(n)].vector.tolist() for n in range(4)] == rounded.tolist()


class BlockBackend:
    """A backend whose answer is one block. The block has the requested keys in reverse order."""

    capabilities = Capabilities(holds="entries", scope="host", deadline=True)

    def __init__(self) -> None:
        self.held: dict[str, Entry] = {}

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Entry]:
        found = [key for key in reversed(keys) if key in self.held]
        if not found:
            return {}
        made = [self.held[key] for key in found]
        ends = np.array([math.inf if entry.expires is None else entry.expires for entry in made])
        created = np.array([entry.created for entry in made])
        values = np.stack([entry.vector for entry in made])
        return Entries(blocks=[Block(found, values, created, ends, [entry.metadata for entry in made])])

    def set_many(self, items: Mapping[str, Entry], ttl: float | None, /) -> None:
        self.held.update(items)

    def close(self) -> None: ...


@pytest.mark.parametrize("backend", [BlockBackend, DictBackend])
@pytest.mark.parametrize("tells", [True, False])
def test_a_cache_answers_from_blocks(backend: type[Any], tells: bool) -> None:
    texts = [f"text {n % 30}" for n in range(50)]
    shared = backend()
    provider = CountingProvider(dimensions=16, tells_dimensions=tells)
    memory = MemoryBackend()
    with Cache(provider, [Tier(shared, name="shared")]) as cold:
        cold.fetch(texts[:20], metadata=[{"n": n} for n in range(20)])
    again = DictBackend(store=shared) if isinstance(shared, DictBackend) else shared
    with Cache(provider, [memory, Tier(again, name="shared")]) as warm:
        expected = np.stack([provider.vector_of(text) for text in texts])
        fetched = warm.fetch(texts, store=False)
        assert (fetched.vectors == expected).all()
        assert [source for source in fetched.sources[:30]] == ["shared"] * 20 + ["provider"] * 10
        assert fetched.metadata[:20] == [{"n": n} for n in range(20)]
        assert (warm.embed_batch(texts) == expected).all()
        assert (warm.embed_batch(texts[::-1]) == expected[::-1]).all()
        for key in memory.scan(""):
            entry = memory.get(key)
            assert entry is not None
            assert type(entry.vector.base) is bytes
            assert len(entry.vector.base) == 4 * 16
        assert warm.stats().tiers["memory"].hits == 30
        assert warm.stats().tiers["shared"].hits == 40
