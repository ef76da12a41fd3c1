"""Processes that write to a disk backend are killed at random moments.

Each writer prints which batches ``set_many`` has acknowledged. Whenever it is killed, all acknowledged batches are
found, bit for bit, and no entry that is served is damaged.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from embedonce.vectors import Entry, decode_frames
from embedonce_backends.disk import DiskBackend

BATCH = 48

WRITER = """
import random, sys
from pathlib import Path
import numpy as np
from embedonce.vectors import Entry, encode_frames
from embedonce_backends.disk import DiskBackend

folder, number, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
backend = DiskBackend(path=folder)
print("ready", flush=True)
for turn in range(1_000_000):
    items = {}
    for n in range(batch):
        vector = np.random.default_rng([number, turn, n]).random((17, 384, 1536)[turn % 3], np.float32)
        items[f"eo1.kill.{number}.{turn}.{n}"] = Entry(vector, 1.0)
    backend.set_many(encode_frames(items), None)
    print(turn, flush=True)
    if turn % 5 == 4:
        # So that a kill can also interrupt overwriting and removing.
        backend.set_many(encode_frames(items), 3600.0)
        backend.set_many({f"eo1.gone.{number}.{n}": b"x" * 5000 for n in range(batch)}, None)
        backend.delete_many([f"eo1.gone.{number}.{n}" for n in range(batch)])
"""


def start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(number), str(BATCH)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )


def kill_after(child: subprocess.Popen[bytes], batches: float) -> list[int]:
    """Kill the child after ``batches``, usually in the middle of one; return the turns that it had acknowledged.

    The moment is given in batches, because after a few seconds a busy machine may not even have started the child.
    """
    assert child.stdout is not None
    with child.stdout as output:
        assert output.readline() == b"ready\n"
        whole, part = divmod(batches, 1)
        times = [time.monotonic()]
        for turn in range(int(whole)):
            assert int(output.readline()) == turn
            times.append(time.monotonic())
        time.sleep(part * (times[-1] - times[-2] if whole else 0.05))
        child.kill()
        child.wait(60)
        lines = output.read().split(b"\n")
    # The last line may be incomplete.
    return [*range(int(whole)), *(int(line) for line in lines[:-1])]


def keys_of(number: int, turns: list[int]) -> list[str]:
    return [f"eo1.kill.{number}.{turn}.{n}" for turn in turns for n in range(BATCH)]


def assert_all_stored(backend: DiskBackend, keys: list[str]) -> None:
    """Require that every key has the vector that was written under it."""
    for first in range(0, len(keys), 480):
        part = keys[first : first + 480]
        decoded = decode_frames(backend.get_many(part), now=2.0)
        assert (decoded.corrupt, decoded.missed) == ([], [])
        assert set(decoded.entries) == set(part), "an acknowledged entry is lost"
        for key in part:
            assert_vector(key, decoded.entries[key])


def assert_vector(key: str, entry: Entry) -> None:
    number, turn, n = map(int, key.split(".")[2:])
    expected = np.random.default_rng([number, turn, n]).random((17, 384, 1536)[turn % 3], np.float32)
    np.testing.assert_array_equal(entry.vector, expected)


def test_a_kill_loses_no_acknowledged_entry(tmp_path: Path) -> None:
    chance = random.Random(20)
    acknowledged: dict[int, list[int]] = {}
    reader = DiskBackend(path=tmp_path)  # open all the time, as the other processes of a host are
    for turn in range(8):
        numbers = [turn * 10, turn * 10 + 1]
        children = [start(tmp_path, number) for number in numbers]
        for number, child in zip(numbers, children, strict=True):
            acknowledged[number] = kill_after(child, chance.uniform(0.0, 10.0))
            assert_all_stored(reader, keys_of(number, acknowledged[number]))
        if turn == 4:
            # From here on no process has the file open between the kills, so the next one recovers the log.
            reader.close()
            reader = DiskBackend(path=tmp_path)
            reader.close()
        if turn >= 4:
            reader = DiskBackend(path=tmp_path)
    assert sum(map(len, acknowledged.values())) > 50, "the writers were killed before they wrote"
    for number, turns in acknowledged.items():
        assert_all_stored(reader, keys_of(number, turns))
    unacknowledged = set(reader.scan("eo1.kill.")) - {
        key for number, turns in acknowledged.items() for key in keys_of(number, turns)
    }
    assert_all_stored(reader, sorted(unacknowledged))
    reader.close()
    assert_database_is_intact(tmp_path)


def assert_database_is_intact(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["cache.db"], "no other file is left"
    connection = sqlite3.connect(folder / "cache.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()


def test_a_process_killed_while_it_makes_the_file(tmp_path: Path) -> None:
    chance = random.Random(3)
    # The kills happen at moments from before the folder exists to after the first batch.
    for turn in range(6):
        folder = tmp_path / str(turn)
        child = start(folder, turn)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.0, 0.012))
        finally:
            child.kill()
            child.communicate()
        backend = DiskBackend(path=folder)
        stored = {f"eo1.after.{n}": bytes([n]) * 100 for n in range(10)}
        backend.set_many(stored, None)
        assert backend.get_many(list(stored)) == stored
        assert_all_stored(backend, sorted(backend.scan("eo1.kill.")))
        backend.close()
        assert_database_is_intact(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_killed_children_lose_no_acknowledged_entry(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.set_many({"eo1.parent.0": b"parent"}, None)
    chance = random.Random(7)
    acknowledged: list[str] = []
    for turn in range(12):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 and later warn about forking while threads run. pytest may have some; the child needs none.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:  # pragma: no cover  (another process)
            try:
                for n in range(1_000_000):
                    key = f"eo1.child.{turn}.{n}"
                    backend.set_many({key: key.encode() * 40}, None)
                    os.write(writer, f"{key}\n".encode())
            finally:
                os._exit(1)
        os.close(writer)
        backend.set_many({f"eo1.parent.{turn}": b"parent"}, None)
        with open(reader, "rb") as output:
            lines = [output.readline() for _ in range(chance.randrange(4, 30))]
            time.sleep(chance.uniform(0.0, 0.002))
            os.kill(child, 9)
            os.waitpid(child, 0)
            acknowledged += b"".join([*lines, output.read()]).decode().split("\n")[:-1]
    assert len(acknowledged) > 50
    assert backend.get_many(acknowledged) == {key: key.encode() * 40 for key in acknowledged}
    assert backend.count("eo1.parent.") == 12
    backend.close()
    assert_database_is_intact(tmp_path)
