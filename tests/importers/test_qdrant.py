"""The importer ``qdrant`` reads collections that qdrant-client has written."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import optional
import pytest

from embedonce.errors import ConfigError, SourceError
from embedonce.testing import ImporterContract
from embedonce_importers.qdrant import QdrantImporter

from .stores.qdrant import serve, write, write_collection

pytestmark = optional.needs("qdrant_client")

TEXTS = ["first", "", "Grüße 🎉", "a\nb", " first ", "First"]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 8)).astype(np.float32)


@pytest.fixture
def server() -> Iterator[str]:
    with serve() as (url, _):
        yield url


def read(**options: Any) -> tuple[list[str], list[list[float]], dict[str, int]]:
    importer = QdrantImporter(**options)
    importer.check()
    parts = list(importer.scan())
    importer.close()
    counts: dict[str, int] = {}
    for part in parts:
        counts |= {reason: counts.get(reason, 0) + number for reason, number in part.unreadable.items()}
    texts = [text for part in parts for text in part.texts]
    return texts, [row.tolist() for part in parts for row in np.asarray(part.vectors)], counts


def refuse(**options: Any) -> str:
    importer = QdrantImporter(**options)
    with pytest.raises(SourceError) as caught:
        importer.check()
    return str(caught.value)


class TestContract(ImporterContract):
    examples = 3
    scan_length = 2_100
    secrets = ("hunter2hunter2",)

    @pytest.fixture(autouse=True)
    def with_servers(self) -> Iterator[None]:
        with ExitStack() as self.servers:
            yield

    def make(self, texts: Sequence[str], vectors: Any) -> QdrantImporter:
        url, _ = self.servers.enter_context(serve())
        return QdrantImporter(**write(url, texts, vectors))  # type: ignore[arg-type]

    def missing(self) -> tuple[QdrantImporter, str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        return QdrantImporter(url=url), url


def test_only_reading_requests_are_sent() -> None:
    with serve() as (url, requests):
        write(url, TEXTS, VECTORS)
        requests.clear()
        importer = QdrantImporter(url=url)
        importer.check()
        assert importer.count() == len(TEXTS)
        list(importer.scan())
    assert {(method, path) for method, path in requests} == {
        ("GET", "/collections"),
        ("GET", "/collections/passages"),
        ("POST", "/collections/passages/points/count"),
        ("POST", "/collections/passages/points/scroll"),
    }


def test_the_collection_is_chosen(server: str) -> None:
    write_collection(server, "one", TEXTS[:1], VECTORS[:1])
    assert read(url=server)[:2] == (TEXTS[:1], VECTORS[:1].tolist())
    write_collection(server, "two", TEXTS, VECTORS)
    assert "it has 'one', 'two'" in refuse(url=server)
    assert 'did you mean "two"?' in refuse(url=server, collection="tow")
    assert read(url=server, collection="two")[:2] == (TEXTS, VECTORS.tolist())
    assert QdrantImporter(url=server, collection="two").source.name == f"qdrant {server}, collection 'two'"


@pytest.mark.parametrize("field", ["page_content", "content", "text", "document"])
def test_the_fields_of_known_programs_are_found(server: str, field: str) -> None:
    payloads = [{field: text, "title": "other"} for text in TEXTS]
    write_collection(server, "a", TEXTS, VECTORS, payloads=payloads)
    assert read(url=server)[:2] == (TEXTS, VECTORS.tolist())


def test_the_field_of_the_texts_is_chosen(server: str) -> None:
    payloads = [{"body": text, "title": "other"} for text in TEXTS]
    write_collection(server, "a", TEXTS, VECTORS, payloads=payloads)
    assert "'body', 'title'" in refuse(url=server)
    assert 'did you mean "body"?' in refuse(url=server, text_field="bodi")
    assert read(url=server, text_field="body")[:2] == (TEXTS, VECTORS.tolist())
    write_collection(server, "b", TEXTS, VECTORS, payloads=[{"text": text, "content": "x"} for text in TEXTS])
    assert "text_field" in refuse(url=server, collection="b")
    assert read(url=server, collection="b", text_field="text")[0] == TEXTS


def test_a_field_that_only_late_points_have_is_found(server: str) -> None:
    payloads: list[dict[str, Any]] = [{"title": "none"}] * 100 + [{"title": "late", "body": "late text"}]
    write_collection(server, "a", [""] * 101, np.repeat(VECTORS[:1], 101, axis=0), payloads=payloads)
    assert read(url=server, text_field="body")[::2] == (["late text"], {"point without a text": 100})
    assert "'title'" in refuse(url=server)
    assert 'has no field "bodi"' in refuse(url=server, text_field="bodi")


def test_points_without_a_text_are_counted(server: str) -> None:
    payloads: list[dict[str, Any]] = [{"text": "a"}, {}, {"text": None}, {"text": 1}, {"text": ["a"]}, {"text": "b"}]
    write_collection(server, "a", TEXTS, VECTORS, payloads=payloads)
    assert read(url=server) == (["a", "b"], VECTORS[[0, 5]].tolist(), {"point without a text": 4})


@optional.needs("llama_index.core")
def test_the_nodes_of_llama_index_are_read_if_their_text_was_embedded_alone(server: str) -> None:
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores.utils import node_to_metadata_dict

    nodes = [
        TextNode(text="alone"),
        TextNode(text="with a file", metadata={"file": "a"}),
        TextNode(text="with an excluded file", metadata={"file": "a"}, excluded_embed_metadata_keys=["file"]),
    ]
    payloads = [node_to_metadata_dict(node, remove_text=False, flat_metadata=False) for node in nodes]
    write_collection(server, "a", TEXTS[:3], VECTORS[:3], payloads=payloads)
    texts, rows, unreadable = read(url=server)
    assert (texts, rows) == (["alone", "with an excluded file"], VECTORS[[0, 2]].tolist())
    assert list(unreadable.values()) == [1]


def test_a_named_vector_is_chosen(server: str) -> None:
    from qdrant_client import models

    config = {name: models.VectorParams(size=8, distance=models.Distance.DOT) for name in ("one", "two")}
    options: dict[str, Any] = {"vectors_config": config}
    write_collection(
        server, "a", TEXTS, VECTORS, make_vector=lambda row: {"one": row, "two": [-x for x in row]}, **options
    )
    assert "'one', 'two'" in refuse(url=server)
    assert 'did you mean "one"?' in refuse(url=server, vector="on")
    assert read(url=server, vector="one")[:2] == (TEXTS, VECTORS.tolist())
    assert read(url=server, vector="two")[:2] == (TEXTS, (-VECTORS).tolist())
    write_collection(server, "b", TEXTS, VECTORS, make_vector=lambda row: {"one": row}, **options)
    assert read(url=server, collection="b", vector="two")[2] == {"point without the vector": 6}


def test_several_vectors_per_text_and_small_integers_are_refused(server: str) -> None:
    from qdrant_client import models

    comparator = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    several = models.VectorParams(size=8, distance=models.Distance.DOT, multivector_config=comparator)
    write_collection(server, "a", TEXTS, VECTORS, vectors_config=several, make_vector=lambda row: [row, row])
    assert "multivector" in refuse(url=server, collection="a")
    small = models.VectorParams(size=8, distance=models.Distance.DOT, datatype=models.Datatype.UINT8)
    write_collection(server, "b", TEXTS, np.ones((6, 8), np.float32), vectors_config=small)
    assert "uint8" in refuse(url=server, collection="b")


def test_a_collection_with_cosine_distance_has_normalised_vectors_and_says_so(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "embedonce")
    write_collection(server, "a", TEXTS, VECTORS, distance="Cosine")
    texts, rows, _ = read(url=server)
    assert texts == TEXTS
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert "normalises each vector" in caplog.text


def test_an_empty_collection_has_no_texts(server: str) -> None:
    write_collection(server, "a", [], np.empty((0, 8), np.float32))
    assert read(url=server) == ([], [], {})


def test_a_refused_key_names_the_option() -> None:
    with serve(api_key="right") as (url, _), pytest.warns(UserWarning, match="insecure connection"):
        message = refuse(url=url, api_key="hunter2hunter2")
    assert "api_key" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("url", ["localhost:6333", "http://user:hunter2@localhost", "http://localhost/a", "http://h:p"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url") as caught:
        QdrantImporter(url=url)
    assert "hunter2" not in str(caught.value)
