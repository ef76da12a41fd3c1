"""The S3 server of moto on loopback, and a proxy in front of it that causes faults on request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from threading import Lock
from typing import Any, NamedTuple

import boto3
import moto.backends
import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from embedonce.testing import FaultProxy

BUCKET = "vectors"
CREDENTIALS = {"region": "us-east-1", "access_key_id": "test", "secret_access_key": "a-secret-of-the-test"}


class S3(NamedTuple):
    endpoint: str
    proxy: FaultProxy
    """The proxy between the endpoint and the server."""
    server: str

    def options(self, prefix: str) -> dict[str, Any]:
        """Return the options of a backend."""
        return {"url": f"s3://{BUCKET}/{prefix}", "endpoint": self.endpoint, **CREDENTIALS}


@pytest.fixture(scope="session")
def atomic_puts() -> Iterator[None]:
    """Make a PUT atomic, as in S3. moto checks whether the object exists and then stores it, in several threads."""
    lock, put_object = Lock(), S3Response.put_object

    def put(response: S3Response) -> Any:
        with lock:
            return put_object(response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put)
        yield


@pytest.fixture(scope="session")
def listed_services() -> Iterator[None]:
    """List moto's services once. moto lists them in its own folder for each request, which takes most of its time."""
    services = list(moto.backends.list_of_moto_modules())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moto.backends, "list_of_moto_modules", lambda: services)
        yield


@pytest.fixture(scope="session")
def s3(atomic_puts: None, listed_services: None) -> Iterator[S3]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with FaultProxy(host, port) as proxy:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield S3(f"http://{proxy.url_port}", proxy, f"http://{host}:{port}")
    server.stop()


_numbers = count()


@pytest.fixture
def prefix() -> str:
    """Return a prefix of the bucket that no other test uses."""
    return f"test-{next(_numbers)}"
