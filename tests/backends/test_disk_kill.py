"""The disk backend killed in the middle of writing, again and again.

Each writer says on standard output which batches ``set_many`` has acknowledged. Whatever the moment of its
death, all of those are there, bit for bit, and nothing that is served is damaged.
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
        # What is stored again, and what is removed, is cut off as well.
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


def killed_after(child: subprocess.Popen[bytes], batches: float) -> list[int]:
    """Kill the child after so many batches, in the midst of the last; return the turns that it had acknowledged.

    Batches, not seconds: on a busy machine it would not have begun by then.
    """
    assert child.stdout is not None
    with child.stdout as said:
        assert said.readline() == b"ready\n"
        whole, part = divmod(batches, 1)
        times = [time.monotonic()]
        for turn in range(int(whole)):
            assert int(said.readline()) == turn
            times.append(time.monotonic())
        time.sleep(part * (times[-1] - times[-2] if whole else 0.05))
        child.kill()
        child.wait(60)
        lines = said.read().split(b"\n")
    # The last one may be cut off.
    return [*range(int(whole)), *(int(line) for line in lines[:-1])]


def keys_of(number: int, turns: list[int]) -> list[str]:
    return [f"eo1.kill.{number}.{turn}.{n}" for turn in turns for n in range(BATCH)]


def require_whole(backend: DiskBackend, keys: list[str]) -> None:
    """Require that all keys are there and hold the vectors that were written under them."""
    for first in range(0, len(keys), 480):
        part = keys[first : first + 480]
        decoded = decode_frames(backend.get_many(part), now=2.0)
        assert (decoded.corrupt, decoded.missed) == ([], [])
        assert set(decoded.entries) == set(part), "an acknowledged entry is lost"
        for key in part:
            require_vector(key, decoded.entries[key])


def require_vector(key: str, entry: Entry) -> None:
    number, turn, n = map(int, key.split(".")[2:])
    expected = np.random.default_rng([number, turn, n]).random((17, 384, 1536)[turn % 3], np.float32)
    np.testing.assert_array_equal(entry.vector, expected)


def test_nothing_acknowledged_is_lost_to_kill(tmp_path: Path) -> None:
    chance = random.Random(20)
    acknowledged: dict[int, list[int]] = {}
    reader = DiskBackend(path=tmp_path)  # open all the time, as the other processes of a host are
    for turn in range(8):
        numbers = [turn * 10, turn * 10 + 1]
        children = [start(tmp_path, number) for number in numbers]
        for number, child in zip(numbers, children, strict=True):
            acknowledged[number] = killed_after(child, chance.uniform(0.0, 10.0))
            require_whole(reader, keys_of(number, acknowledged[number]))
        if turn == 4:
            # From here on nobody has it open between the kills: the next to come recovers the log.
            reader.close()
            reader = DiskBackend(path=tmp_path)
            reader.close()
        if turn >= 4:
            reader = DiskBackend(path=tmp_path)
    assert sum(map(len, acknowledged.values())) > 50, "the writers were killed before they wrote"
    for number, turns in acknowledged.items():
        require_whole(reader, keys_of(number, turns))
    unacknowledged = set(reader.scan("eo1.kill.")) - {
        key for number, turns in acknowledged.items() for key in keys_of(number, turns)
    }
    require_whole(reader, sorted(unacknowledged))
    reader.close()
    require_sound(tmp_path)


def require_sound(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["cache.db"], "no file is left over"
    connection = sqlite3.connect(folder / "cache.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted = connection.execute("SELECT COUNT(*) FROM Cache").fetchone()
        assert connection.execute("SELECT value FROM Settings WHERE key = 'count'").fetchone() == counted
    finally:
        connection.close()


def test_killed_while_the_file_is_made(tmp_path: Path) -> None:
    chance = random.Random(3)
    # The whole of a fresh file's first moments: from before the folder is there to after the first batch.
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
        require_whole(backend, sorted(backend.scan("eo1.kill.")))
        backend.close()
        require_sound(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_killed_children_of_one_parent(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.set_many({"eo1.parent.0": b"parent"}, None)
    chance = random.Random(7)
    acknowledged: list[str] = []
    for turn in range(12):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 and later warn of a fork beside threads: pytest may have some, this child needs none.
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
        with open(reader, "rb") as said:
            told = [said.readline() for _ in range(chance.randrange(4, 30))]
            time.sleep(chance.uniform(0.0, 0.002))
            os.kill(child, 9)
            os.waitpid(child, 0)
            acknowledged += b"".join([*told, said.read()]).decode().split("\n")[:-1]
    assert len(acknowledged) > 50
    assert backend.get_many(acknowledged) == {key: key.encode() * 40 for key in acknowledged}
    assert backend.count("eo1.parent.") == 12
    backend.close()
    require_sound(tmp_path)
