"""Compare the CPU time of one request of hits: ``embedonce serve``, a raw ASGI application, and LiteLLM's proxy.

    python benchmarks/serve_speed.py --seconds 5 --rounds 3
    python benchmarks/serve_speed.py --litellm /path/to/venv/bin/python

It requires ``wrk`` (Debian's package) and ``pip install 'embedonce[serve]'``. All servers run in the same run: each on
one core, with one worker, while ``wrk`` with 8 connections has another core. The texts have 200 bytes and are stored
before the clock starts. Requests of one text ask for 1,000 texts in turns; those of 32 texts are all the same. The
figure is the server's CPU time (user and system) per request. ``--litellm`` names a Python with ``litellm[proxy]``; its
proxy takes about a minute to start.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedonce.testing.servers.openai import OpenAIServer

KEY = "sk-" + hashlib.sha256(b"key of the benchmark").hexdigest()
"""LiteLLM refuses to start with a weaker key."""
CONNECTIONS = 8
TEXTS = 1000
"""Number of texts that requests of one text ask for, in turns."""
SERVER_CORE, CLIENT_CORE = "0", "1"
START_SECONDS = 180
FOLDER = Path(__file__).parent

CONFIGURATION = """\
[provider]
type = "ngram"
dimensions = {dimensions}

[[tiers]]
type = "memory"

[[serve.models]]
name = "benchmark"
provider = {{ type = "ngram", dimensions = {dimensions} }}

[[serve.tenants]]
name = "benchmark"
keys = ["{key}"]
"""


class Case(NamedTuple):
    """One kind of request."""

    dimensions: int
    inputs: int
    encoding: str

    def __str__(self) -> str:
        return f"{self.dimensions} x{self.inputs} {self.encoding}"


CASES = [
    Case(384, 1, "float"),
    Case(384, 1, "base64"),
    Case(384, 32, "base64"),
    Case(1536, 1, "base64"),
    Case(1536, 32, "float"),
    Case(1536, 32, "base64"),
]


class Measured(NamedTuple):
    """The result of one run of ``wrk``."""

    microseconds: float
    """CPU time of the server per request."""
    rate: float
    """Requests per second."""


def list_texts(count: int) -> list[str]:
    return [f"text number {i} ".ljust(200, "x") for i in range(count)]


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def start(command: Sequence[str], port: int, path: str, **environment: str) -> Iterator[int]:
    """Run a server on one core until the end of the ``with`` block, and yield its process id."""
    process = subprocess.Popen(
        ["taskset", "-c", SERVER_CORE, *command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
                    break
            except urllib.error.HTTPError:
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[0]} did not start") from None
                time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children that ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def post(port: int, body: bytes) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def make_bodies(case: Case) -> list[bytes]:
    """Return the bodies of the requests, which are sent in turns: one body per text, or one body with all texts."""
    texts = list_texts(TEXTS if case.inputs == 1 else case.inputs)
    inputs: list[Any] = list(texts) if case.inputs == 1 else [texts]
    fields = {"model": "benchmark", "encoding_format": case.encoding}
    return [json.dumps({**fields, "input": given}).encode() for given in inputs]


def measure(pid: int, port: int, bodies: Sequence[bytes], seconds: float, folder: Path) -> Measured:
    """Send requests for some seconds."""
    script = folder / "request.lua"
    quoted = ["'" + body.decode().replace("\\", "\\\\").replace("'", "\\'") + "'" for body in bodies]
    script.write_text(
        f"""\
local headers = {{["content-type"] = "application/json", ["authorization"] = "Bearer {KEY}"}}
local bodies = {{{", ".join(quoted)}}}
local requests, last = {{}}, 0

function init(args)
    for i, body in ipairs(bodies) do
        requests[i] = wrk.format("POST", nil, headers, body)
    end
end

function request()
    last = last % #requests + 1
    return requests[last]
end
"""
    )
    before = read_cpu_seconds(pid)
    wrk = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script)]
    done = subprocess.run(
        ["taskset", "-c", CLIENT_CORE, *wrk, f"http://127.0.0.1:{port}/v1/embeddings"],
        check=True,
        capture_output=True,
        text=True,
    )
    used = read_cpu_seconds(pid) - before
    found = re.search(r"(\d+) requests in", done.stdout)
    if found is None or "Non-2xx" in done.stdout or not int(found[1]):
        raise SystemExit(f"wrk failed:\n{done.stdout}")
    return Measured(used / int(found[1]) * 1e6, int(found[1]) / seconds)


def run_case(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, list[Measured]]:
    """Measure embedonce and the floor for one kind of request, in turns.

    Each round starts both servers anew, because the CPU time of a process depends on where its memory happens to be.
    """
    bodies = make_bodies(case)
    texts = list_texts(TEXTS if case.inputs == 1 else case.inputs)
    config = folder / "embedonce.toml"
    config.write_text(CONFIGURATION.format(dimensions=case.dimensions, key=KEY))
    (folder / "texts.json").write_text(json.dumps(texts))
    results: dict[str, list[Measured]] = {"embedonce": [], "floor": []}
    for _ in range(options.rounds):
        ours, floor = find_port(), find_port()
        serve = [sys.executable, "-m", "embedonce", "serve", "--config", str(config), "--port", str(ours)]
        uvicorn = [sys.executable, "-m", "uvicorn", "--app-dir", str(FOLDER), "serve_floor:app", "--port", str(floor)]
        uvicorn += ["--http", "httptools", "--loop", "uvloop", "--lifespan", "off", "--log-level", "warning"]
        environment = {
            "FLOOR_DIMENSIONS": str(case.dimensions),
            "FLOOR_KEY": KEY,
            "FLOOR_TEXTS": str(folder / "texts.json"),
        }
        with (
            start(serve, ours, "/health/live") as our_pid,
            start([*uvicorn, "--no-access-log"], floor, "/", **environment) as floor_pid,
        ):
            for name, pid, port in (("embedonce", our_pid, ours), ("floor", floor_pid, floor)):
                for body in bodies * 2:
                    post(port, body)
                results[name].append(measure(pid, port, bodies, options.seconds, folder))
    return results


def run_litellm(python: str, options: argparse.Namespace, folder: Path) -> None:
    """Print LiteLLM's rate for one input of 384 dimensions, with its local cache."""
    body = json.dumps({"model": "benchmark", "input": list_texts(1), "encoding_format": "float"}).encode()
    port = find_port()
    with OpenAIServer(dimensions=384) as api:
        config = folder / "litellm.yaml"
        config.write_text(
            json.dumps(
                {
                    "model_list": [
                        {
                            "model_name": "benchmark",
                            "litellm_params": {
                                "model": "openai/text-embedding-3-small",
                                "api_base": api.base_url,
                                "api_key": "any",
                            },
                        }
                    ],
                    "general_settings": {"master_key": KEY},
                    "litellm_settings": {
                        "cache": True,
                        "cache_params": {"type": "local", "supported_call_types": ["embedding", "aembedding"]},
                    },
                }
            )
        )
        proxy = [str(Path(python).with_name("litellm")), "--config", str(config), "--port", str(port)]
        with start([*proxy, "--host", "127.0.0.1"], port, "/health/liveliness") as pid:
            for _ in range(3):
                post(port, body)
            results = [measure(pid, port, [body], options.seconds, folder) for _ in range(options.rounds)]
        print(
            f"litellm, 384 x1 float: {statistics.median(one.microseconds for one in results):,.0f} µs, "
            f"{statistics.median(one.rate for one in results):,.1f} requests/s, {len(api.requests)} calls of the API"
        )


def main() -> None:
    """Print one row per kind of request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litellm", metavar="PYTHON")
    options = parser.parse_args()
    for program in ("wrk", "taskset"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing; on Debian: apt install wrk util-linux")
    print("CPU µs per request (requests/s), median; ratio: median of the ratios of neighbouring runs")
    print(f"{'request':<20} {'embedonce':>20} {'raw ASGI, dict':>20} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in CASES:
            results = run_case(case, options, folder)
            shown = [
                f"{statistics.median(one.microseconds for one in runs):,.0f} "
                f"({statistics.median(one.rate for one in runs):,.0f})"
                for runs in (results["embedonce"], results["floor"])
            ]
            pairs = zip(results["embedonce"], results["floor"], strict=True)
            ratio = statistics.median(mine.microseconds / least.microseconds for mine, least in pairs)
            print(f"{case!s:<20} {shown[0]:>20} {shown[1]:>20} {ratio:>6.2f}", flush=True)
        if options.litellm:
            run_litellm(options.litellm, options, folder)


if __name__ == "__main__":
    main()
