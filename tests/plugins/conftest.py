"""Install the plugins of ``examples/plugins/`` with pip, like any third-party plugin."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"
NAMES = sorted(file.parent.name for file in PLUGINS.glob("*/pyproject.toml"))
BUCKET = "vectors"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed every example plugin, shared by all test processes."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    site, done = shared / "plugins", shared / "plugins.done"
    with (shared / "plugins.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            install(site, tmp_path_factory.mktemp("sources"))
            done.touch()
    return site


def install(site: Path, sources: Path) -> None:
    shutil.rmtree(site, ignore_errors=True)  # a failed installation may have left files
    for name in NAMES:  # copy the sources, because pip may build in place
        shutil.copytree(PLUGINS / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(site), *(str(sources / name) for name in NAMES)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=250)


@pytest.fixture
def environment(installed: Path) -> dict[str, str]:
    """Environment of a process in which the plugins are installed."""
    dropped = ("PYTEST_XDIST", "PYTEST_CURRENT", "PYTEST_ADDOPTS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of moto's S3 server on loopback, with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield endpoint
    server.stop()
