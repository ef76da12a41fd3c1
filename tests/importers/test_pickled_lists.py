"""The parser of pickled lists agrees with pickle on lists of numbers, and accepts nothing else."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce_importers._pickled_lists import parse_pickled_list

NUMBERS = st.floats(allow_nan=False) | st.integers(-(2**31), 2**31 - 1)
PROTOCOLS = st.integers(2, 5)


class Recorder:
    """Records that a pickle was run."""

    ran = False

    @classmethod
    def run(cls) -> list[float]:
        cls.ran = True
        return [1.0]

    def __repr__(self) -> str:
        return "Recorder()"

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder.run, ()


@given(numbers=st.lists(NUMBERS, min_size=1, max_size=50), protocol=PROTOCOLS, is_optimized=st.booleans())
def test_a_list_of_numbers_is_read_as_pickle_reads_it(numbers: list[float], protocol: int, is_optimized: bool) -> None:
    data = pickle.dumps(numbers, protocol)
    found = parse_pickled_list(pickletools.optimize(data) if is_optimized else data)
    assert found.tobytes() == np.array(pickle.loads(data), np.float64).tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 1002, 1536, 8192, 20_000])
def test_lists_of_several_parts_and_frames_are_read(count: int, protocol: int) -> None:
    numbers = np.random.default_rng(count).standard_normal(count).tolist()
    numbers[::7] = range(len(numbers[::7]))
    assert parse_pickled_list(pickle.dumps(numbers, protocol)).tolist() == numbers


@pytest.mark.parametrize(
    "value",
    [
        [],
        (1.0, 2.0),
        [1.0, None],
        [1.0, True],
        [1.0, "2"],
        [[1.0, 2.0]],
        [1.0, [2.0]],
        [2**40],
        {"a": 1.0},
        1.0,
        b"12345678",
        [b"12345678"],
        np.ones(3),
        [np.float64(1.0)],
        [1j],
        Recorder(),
        [Recorder()],
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_values_are_refused_and_not_run(value: object, protocol: int) -> None:
    Recorder.ran = False
    data = pickle.dumps(value, protocol)
    with pytest.raises(ValueError, match=r"empty list|not a pickled list of floats"):
        parse_pickled_list(data)
    assert not Recorder.ran


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_truncation_is_refused(protocol: int) -> None:
    data = pickle.dumps([1.0, 2, 300, 70_000, -1.5], protocol)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="pickle"):
            parse_pickled_list(data[:length])
    with pytest.raises(ValueError, match="after the end"):
        parse_pickled_list(data + b".")


@settings(max_examples=500)
@given(
    numbers=st.lists(NUMBERS, min_size=1, max_size=8),
    protocol=PROTOCOLS,
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_damaged_pickle_is_refused_or_has_only_numbers(
    numbers: list[float], protocol: int, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(pickle.dumps(numbers, protocol))
    for position, byte in edits:
        data[position % len(data)] = byte
    check_safe(bytes(data))


@given(data=st.binary(max_size=60) | st.lists(st.sampled_from(list(b"\x80\x04\x05]\x94(GKMJaeq.cRi\x81")), max_size=40))
def test_arbitrary_bytes_are_refused_or_have_only_numbers(data: bytes | list[int]) -> None:
    check_safe(b"\x80\x04]\x94" + bytes(data))
    check_safe(bytes(data))


def check_safe(data: bytes) -> None:
    """Whatever the parser accepts has only opcodes that are known to be safe, and pickle reads the same from it."""
    try:
        found = parse_pickled_list(data)
    except ValueError:
        return
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert opcodes <= {
        *("PROTO", "FRAME", "EMPTY_LIST", "MEMOIZE", "BINPUT", "MARK", "APPEND", "APPENDS", "STOP"),
        *("BINFLOAT", "BININT", "BININT1", "BININT2"),
    }
    assert found.ndim == 1
    assert found.size
    try:
        expected = pickle.loads(data)  # safe, because of the opcodes
    except (pickle.UnpicklingError, EOFError):
        return  # pickle also compares the sizes of frames
    assert found.tobytes() == np.array(expected, np.float64).tobytes()
