"""Use three plugins in one chain, configured by ``examples/plugins/embedonce.toml`` and installed with pip."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import embedonce
from embedonce import plugins

from .conftest import PLUGINS

TEXTS = [f"text {number}" for number in range(40)]
KEY, SECRET = "the-access-key", "the-secret-key"

# The first test waits for pip, and each process imports a lot.
pytestmark = pytest.mark.timeout(500)

Open = Callable[[], embedonce.Cache]
_numbers = count()


@pytest.fixture
def folder(tmp_path: Path, installed: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configuration, in a process that has the plugins and a bucket."""
    shutil.copy(PLUGINS / "embedonce.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("S3_ENDPOINT", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("EMBEDONCE__CACHE__FLUSH_TIMEOUT", "60s")
    monkeypatch.setenv("EMBEDONCE__TIERS__OBJECTS__URL", f"s3://vectors/chain-{next(_numbers)}")
    for tier in ("LMDB", "KEYVALUE", "OBJECTS"):  # a busy machine must not cause a timeout
        monkeypatch.setenv(f"EMBEDONCE__TIERS__{tier}__TIMEOUT", "60s")
    return tmp_path


def sources(fetched: embedonce.Fetched) -> dict[str | None, int]:
    return dict(Counter(fetched.sources))


def test_computed_once_promoted_and_forgotten(folder: Path, environment: dict[str, str]) -> None:
    # Compute in another process, from the command line.
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    command = [sys.executable, "-P", "-m", "embedonce", "embed", "texts.txt", "--split", "line", "--out", "out.npy"]
    done = subprocess.run(
        [*command, "--json"], env=environment, check=True, capture_output=True, text=True, timeout=200
    )
    assert json.loads(done.stdout)["computed"] == 40
    assert SECRET not in done.stdout + done.stderr
    expected = np.load(folder / "out.npy")

    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"lmdb": 40}
        assert sources(cache.fetch(TEXTS)) == {"memory": 40}
        np.testing.assert_array_equal(cache.embed_batch(TEXTS), expected)

    # Another machine has neither folder. It promotes what it finds in the bucket into both.
    shutil.rmtree(folder / "vectors")
    shutil.rmtree(folder / "keyvalue")
    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"objects": 40}
        np.testing.assert_array_equal(cache.embed_batch(TEXTS), expected)
    shutil.rmtree(folder / "vectors")
    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"keyvalue": 40}
    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"lmdb": 40}
        np.testing.assert_array_equal(cache.embed_batch(TEXTS), expected)

        cache.forget(TEXTS[:10])
        assert sources(cache.lookup(TEXTS)) == {"memory": 30, None: 10}
    for gone, name in (([], "lmdb"), (["vectors"], "keyvalue"), (["vectors", "keyvalue"], "objects")):
        for each in gone:
            shutil.rmtree(folder / each)
        with embedonce.open("embedonce.toml") as cache:
            assert sources(cache.lookup(TEXTS)) == {name: 30, None: 10}


async def test_the_same_from_an_event_loop(folder: Path) -> None:
    async with embedonce.open("embedonce.toml") as cache:
        assert sources(await cache.afetch(TEXTS)) == {"provider": 40}
    for gone, name in (([], "lmdb"), (["vectors"], "keyvalue"), (["vectors", "keyvalue"], "objects")):
        for each in gone:
            shutil.rmtree(folder / each)
        async with embedonce.open("embedonce.toml") as cache:
            assert sources(await cache.afetch(TEXTS)) == {name: 40}


def test_a_purge_names_the_tier_that_cannot_list(folder: Path) -> None:
    with embedonce.open("embedonce.toml") as cache:
        cache.embed_batch(TEXTS)
        lmdb = plugins.backend("lmdb")(path=folder / "vectors", max_bytes=2**30)
        assert len(list(lmdb.scan("eo1."))) == 81, "40 entries, 40 leases and a space card"
        with pytest.raises(embedonce.EraseIncomplete) as caught:
            cache.purge(version="v1")
        assert set(caught.value.tiers) == {"keyvalue"}
        assert list(lmdb.scan("")) == []
        lmdb.close()
        assert sources(cache.lookup(TEXTS)) == {"keyvalue": 40}
        cache.forget(TEXTS)
        assert sources(cache.lookup(TEXTS)) == {None: 40}


def test_an_unreachable_bucket_does_not_stop_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9")
    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"provider": 40}
        assert sources(cache.fetch(TEXTS)) == {"memory": 40}
    with embedonce.open("embedonce.toml") as cache:
        assert sources(cache.fetch(TEXTS)) == {"lmdb": 40}


COUNTED = """
    import json, sys
    from pathlib import Path
    import embedonce
    from embedonce.plugins import backend

    def provider(texts):
        with open("computed", "a") as file:
            file.write("".join(text + "\\n" for text in texts))
        return [[1.0, float(len(text))] for text in texts]

    tier = embedonce.Tier(backend("lmdb")(path=Path("vectors"), max_bytes=2**24, sync=False), lease=60, timeout=60)
    texts = json.load(sys.stdin)
    with embedonce.Cache(provider, [tier], space={"provider": "mine", "model": "m", "dimensions": 2}) as cache:
        assert len(cache.embed_batch(texts)) == len(texts)
"""


def test_a_lease_on_lmdb_lets_one_process_compute(tmp_path: Path, environment: dict[str, str]) -> None:
    def process(_: int) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", textwrap.dedent(COUNTED)],
            cwd=tmp_path,
            env=environment,
            input=json.dumps(TEXTS),
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done.stderr

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(process, range(3))) == [""] * 3
    assert sorted((tmp_path / "computed").read_text().splitlines()) == sorted(TEXTS)


def test_example_plugins_are_listed_like_any_plugin(folder: Path) -> None:
    found = {plugin.name: plugin for plugin in plugins.installed()}
    for name in ("lmdb", "keyvalue", "objects"):
        assert (found[name].distribution, found[name].kinds, found[name].error) == (
            f"embedonce-{name}",
            ("backend",),
            None,
        )
