"""The text that LlamaIndex embedded for a node is rebuilt exactly, or the node is left out."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optional import needs
from servers import find_free_port

from embedonce.errors import ConfigError, SourceError
from embedonce.testing import ImporterContract, Recipe
from embedonce_importers._json_stores import JsonReader
from embedonce_importers._llama_index_nodes import read_nodes, rebuild_content
from embedonce_importers.llama_index_ingestion import CHANGED, LlamaIndexIngestionImporter

from .stores.llama_index_ingestion import write, write_to_redis
from .test_llama_index import TEXTS, VECTORS, check_equal, merge

pytestmark = needs("llama_index.core")

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
EXPECTED = dict(zip(TEXTS, VECTORS, strict=False))


def run_pipeline(folder: Path, nodes: list[Any], *steps: Any) -> dict[str, Any]:
    """Run LlamaIndex's ingestion pipeline, persist its cache, and return the options of the importer."""
    from llama_index.core.ingestion import IngestionPipeline

    pipeline = IngestionPipeline(transformations=list(steps))
    pipeline.run(nodes=nodes)
    pipeline.persist(str(folder))
    return {"path": folder / "llama_cache", "line_breaks": "kept"}


def scan(options: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    importer = LlamaIndexIngestionImporter(**options)
    try:
        importer.check()
        return merge(list(importer.scan()))
    finally:
        importer.close()
        importer.close()


def rebuild(node: Any) -> str:
    """Return the content that is rebuilt from the JSON in which LlamaIndex stores a node."""
    from llama_index.core.storage.docstore.utils import doc_to_json

    stored = json.dumps({"nodes": [doc_to_json(node)]}).encode()
    (fields,) = read_nodes(JsonReader(io.BytesIO(stored)))
    return rebuild_content(fields)


def test_a_scan_yields_the_vectors_of_a_persisted_cache(tmp_path: Path) -> None:
    found, unreadable = scan(write(tmp_path, TEXTS, VECTORS[: len(TEXTS)]))
    check_equal(found, EXPECTED)
    assert not unreadable


def test_a_scan_yields_the_vectors_of_a_cache_in_redis(redis_server: Any) -> None:
    options = write_to_redis(redis_server.url, TEXTS, VECTORS[: len(TEXTS)], f"cache-{uuid.uuid4()}")
    found, unreadable = scan(options)
    check_equal(found, EXPECTED)
    assert not unreadable


def test_values_in_redis_that_are_no_entries_are_counted(redis_server: Any) -> None:
    from redis import Redis

    collection = f"cache-{uuid.uuid4()}"
    options = write_to_redis(redis_server.url, TEXTS[:1], VECTORS[:1], collection)
    with Redis.from_url(redis_server.url) as client:
        client.hset(collection, mapping={"a": b"\x80\x04", "b": "", "c": "[]", "d": '{"nodes": [1, {}]}', "e": '{"no'})
    importer = LlamaIndexIngestionImporter(**options)  # type: ignore[arg-type]
    found, unreadable = merge(list(importer.scan()))
    importer.close()
    check_equal(found, {TEXTS[0]: VECTORS[0]})
    assert sum(unreadable.values()) == 6


def test_a_missing_collection_is_an_error_in_redis(redis_server: Any) -> None:
    importer = LlamaIndexIngestionImporter(url=redis_server.url, collection="missing-collection")
    with pytest.raises(SourceError, match="has no hash 'missing-collection'; set collection"):
        importer.check()
    importer.close()


def test_nodes_of_a_splitter_have_the_content_with_their_metadata(tmp_path: Path) -> None:
    from llama_index.core.node_parser import TokenTextSplitter
    from llama_index.core.schema import Document

    from .stores.llama_index_models import HashEmbedding, find_vector

    documents = [
        Document(text="One sentence. " * 40, metadata={"file": "a.txt", "page": 3}),
        Document(text="Another one. " * 40, metadata={"file": "b.txt"}, excluded_embed_metadata_keys=["file"]),
    ]
    model = HashEmbedding(model_name="hash")
    # SentenceSplitter needs data of NLTK, which NLTK refuses to read if a package manager has linked the files.
    splitter = TokenTextSplitter(chunk_size=20, chunk_overlap=0, tokenizer=str.split)
    found, unreadable = scan(run_pipeline(tmp_path, documents, splitter, model))
    check_equal(found, {text: find_vector(text) for text in model.asked})
    assert any(text.startswith("file: a.txt\npage: 3\n\nOne") for text in found)
    assert any(text.startswith("Another") for text in found)
    assert not unreadable


def test_documents_that_are_embedded_without_a_splitter_are_found(tmp_path: Path) -> None:
    from llama_index.core.schema import Document, IndexNode, MediaResource, Node

    from .stores.llama_index_models import HashEmbedding, find_vector

    model = HashEmbedding(model_name="hash")
    nodes = [
        Document(text=" a ", metadata={"k": " "}, metadata_template="{value}"),
        Document(text=" b "),
        Node(text_resource=MediaResource(text="c"), metadata={"k": 1}),  # pyright: ignore[reportCallIssue]
        IndexNode(text="d", index_id="other", metadata={"k": None}),  # pyright: ignore[reportCallIssue]
    ]
    found, unreadable = scan(run_pipeline(tmp_path, nodes, model))
    check_equal(found, {text: find_vector(text) for text in model.asked})
    assert len(found) == 4
    assert not unreadable


metadata_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
template_parts = st.sampled_from(["{key}", "{value}", "{{", "}}", ": ", "\n", " ", "é", "[]"])
text_parts = st.sampled_from(["{content}", "{metadata_str}", "{{", "}}", "\n\n", " ", "[", "<c>"])
metadata = st.dictionaries(st.sampled_from(["a", "b", " ", "file path", "{x}"]), metadata_values, max_size=4)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(max_size=12),
    metadata,
    st.lists(st.sampled_from(["a", "b", " ", "other"]), max_size=3),
    st.lists(template_parts, max_size=5).map("".join),
    st.sampled_from(["\n", "", " | ", "{key}"]),
    st.lists(text_parts, max_size=5).map("".join),
    st.sampled_from(["TextNode", "IndexNode", "Document", "Node"]),
)
def test_the_content_is_the_one_that_llama_index_embeds(
    text: str,
    metadata: dict[str, Any],
    excluded: list[str],
    metadata_template: str,
    separator: str,
    text_template: str,
    kind: str,
) -> None:
    from llama_index.core import schema

    options: dict[str, Any] = {
        "metadata": metadata,
        "excluded_embed_metadata_keys": excluded,
        "metadata_template": metadata_template,
        "metadata_separator": separator,
        "text_template": text_template,
    }
    if kind in ("Document", "Node"):
        options["text_resource"] = schema.MediaResource(text=text)
    else:
        options["text"] = text
    if kind == "IndexNode":
        options["index_id"] = "other"
    node = getattr(schema, kind)(**options)
    assert rebuild(node) == node.get_content(metadata_mode=schema.MetadataMode.EMBED)


@pytest.mark.parametrize(
    "template",
    [
        "{key.__class__.__mro__}",
        "{value[0]}",
        "{value!r}",
        "{value:>1000000000}",
        "{value:{key}}",
        "{}",
        "{0}",
        "{other}",
        "{",
        "}",
        "{key",
    ],
)
def test_a_template_with_anything_but_plain_fields_is_left_out_and_not_evaluated(template: str, tmp_path: Path) -> None:
    from llama_index.core.schema import TextNode

    with pytest.raises(ValueError, match="nodes with a template"):
        rebuild(TextNode(text="a", metadata={"k": "v"}, metadata_template=template))
    with pytest.raises(ValueError, match="nodes with a template"):
        rebuild(TextNode(text="a", metadata={"k": "v"}, text_template=template))
    # Nothing is embedded of metadata that is excluded, and the template is not used.
    assert rebuild(TextNode(text="a", text_template=template)) == "a"


def test_nodes_whose_embedded_text_is_not_known_are_left_out_and_counted(tmp_path: Path) -> None:
    from llama_index.core.schema import ImageDocument, ImageNode, MediaResource, Node, TextNode

    from .stores.llama_index_models import HashEmbedding, find_vector

    class CustomNode(TextNode):
        @classmethod
        def class_name(cls) -> str:
            return "CustomNode"

        def get_content(self, metadata_mode: Any = None) -> str:
            return f"custom {self.text}"

    nodes = [
        TextNode(text="good"),
        ImageNode(text="image", image_path="a.png"),
        ImageDocument(text="image", image=PIXEL),
        Node(text_resource=MediaResource(text="both"), image_resource=MediaResource(path=Path("a.png"))),
        TextNode(text="list", metadata={"k": ["a"]}),
        TextNode(text="dict", metadata={"k": {"a": 1}}),
        TextNode(text="excluded list", metadata={"k": ["a"]}, excluded_embed_metadata_keys=["k"]),
        CustomNode(text="text"),
        Node(image_resource=MediaResource(path=Path("a.png"))),
    ]
    found, unreadable = scan(run_pipeline(tmp_path, nodes, HashEmbedding(model_name="hash")))
    check_equal(found, {text: find_vector(text) for text in ("good", "excluded list")})
    assert sum(unreadable.values()) == 7
    assert len(unreadable) == 4


def test_a_node_that_a_later_step_changed_does_not_give_its_new_text_the_old_vector(tmp_path: Path) -> None:
    from llama_index.core.schema import TextNode, TransformComponent

    from .stores.llama_index_models import HashEmbedding, find_vector

    class AddTitle(TransformComponent):
        def __call__(self, nodes: Any, **_: Any) -> Any:
            for node in nodes:
                if node.text != "same":
                    node.metadata["title"] = "t"
            return nodes

    nodes = [TextNode(text="changed"), TextNode(text="same")]
    found, unreadable = scan(run_pipeline(tmp_path, nodes, HashEmbedding(model_name="hash"), AddTitle()))
    check_equal(found, {"same": find_vector("same")})
    assert unreadable == {CHANGED: 2}


def test_texts_with_a_line_break_follow_the_option(tmp_path: Path) -> None:
    from llama_index.core.schema import TextNode

    from .stores.llama_index_models import HashEmbedding, find_vector

    nodes = [TextNode(text="a", metadata={"k": "v"}), TextNode(text="b")]
    options = run_pipeline(tmp_path, nodes, HashEmbedding(model_name="hash"))
    content, vector = "k: v\n\na", find_vector("k: v\n\na")
    b = {"b": find_vector("b")}
    check_equal(scan(options)[0], {content: vector} | b)
    check_equal(scan(options | {"line_breaks": "replaced"})[0], {"k: v  a": vector} | b)
    found, unreadable = scan(options | {"line_breaks": None})
    check_equal(found, b)
    assert list(unreadable.values()) == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"llama_cache": {"secret": {"u": [1.0]}}}, "something other than the nodes of an ingestion cache"),
        ({"llama_cache": {"secret": [1.0]}}, "something other than the nodes of an ingestion cache"),
        ({"llama_cache": {"k": {"nodes": [["secret"]]}}}, "something other than the nodes of an ingestion cache"),
        ({"data": {}}, "has no collection 'llama_cache'; it has 'data'"),
        ('{"llama_cache": {"k": {"nodes": [{"__data__": {"text": "secret', "ends too early"),
    ],
)
def test_a_file_of_another_kind_is_an_error_that_says_what_to_do(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "llama_cache"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SourceError, match=message) as caught:
        LlamaIndexIngestionImporter(path=path).check()
    assert "secret" not in str(caught.value)


def test_stored_nodes_with_missing_or_wrong_fields_are_counted(tmp_path: Path) -> None:
    from llama_index.core.schema import TextNode

    from .stores.llama_index_models import HashEmbedding

    options = run_pipeline(tmp_path, [TextNode(text="a", metadata={"k": 1})], HashEmbedding(model_name="hash"))
    store = json.loads(options["path"].read_bytes())
    ((key, entry),) = store["llama_cache"].items()
    (node,) = entry["nodes"]
    wrong = [
        {**node, "__data__": {**node["__data__"], field: value}}
        for field in ("metadata", "excluded_embed_metadata_keys", "text", "text_template", "metadata_separator")
        for value in (None, 1, True)
    ]
    wrong += [
        {**node, "__data__": {name: value for name, value in node["__data__"].items() if name != field}}
        for field in ("metadata", "metadata_template", "text_template", "text", "class_name", "id_")
    ]
    wrong += [{**node, "__type__": "4"}, {"__data__": node["__data__"]}]
    wrong += [{**node, "__data__": {**node["__data__"], "embedding": value}} for value in ([], "x", [None], [[1.0]], 1)]
    store["llama_cache"][key]["nodes"] = [node, *wrong]
    options["path"].write_text(json.dumps(store))
    found, unreadable = scan(options)
    assert list(found) in ([], ["k: 1\n\na"])
    assert sum(unreadable.values()) + len(found) == 1 + len(wrong)


def test_exactly_one_place_is_given() -> None:
    for options in ({}, {"path": Path("a"), "url": "redis://a"}):
        with pytest.raises(ConfigError, match="set either path"):
            LlamaIndexIngestionImporter(**options)  # type: ignore[arg-type]


def test_the_name_of_a_source_has_no_password() -> None:
    importer = LlamaIndexIngestionImporter(url="redis://user:hunter2@host/1")
    assert "hunter2" not in importer.source.name
    assert "host:6379/1" in importer.source.name
    importer.close()


class TestContract(ImporterContract):
    examples = 5
    scan_length = 1_100  # a scan yields 1,024 at once, and LlamaIndex needs milliseconds per node

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    def make(self, texts: Sequence[str], vectors: np.ndarray) -> LlamaIndexIngestionImporter:
        self.made += 1
        options: dict[str, Any] = write(self.folder / str(self.made), list(texts), vectors)
        return LlamaIndexIngestionImporter(**options)

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(LlamaIndexIngestionImporter, {"path": importer._store.name, "line_breaks": "kept"})

    def missing(self) -> tuple[LlamaIndexIngestionImporter, str]:
        return LlamaIndexIngestionImporter(path=self.folder / "missing"), str(self.folder / "missing")

    def damage(self, importer: Any, text: str) -> None:
        path = Path(importer._store.name)
        store = json.loads(path.read_bytes())
        for entry in store["llama_cache"].values():
            for node in entry["nodes"]:
                if node["__data__"]["text"] == text:
                    node["__data__"]["embedding"] = [1.0, "x"]
        path.write_text(json.dumps(store))

    def snapshot(self, importer: Any) -> object:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


class TestContractInRedis(ImporterContract):
    examples = 5
    scan_length = 1_100  # a scan yields 1,024 at once, and LlamaIndex needs milliseconds per node
    secrets = ("hunter2",)

    @pytest.fixture(autouse=True)
    def on_a_server(self, redis_server: Any) -> None:
        self.server = redis_server

    def make(self, texts: Sequence[str], vectors: np.ndarray) -> LlamaIndexIngestionImporter:
        collection = f"cache-{uuid.uuid4()}"
        options: dict[str, Any] = write_to_redis(self.server.url, list(texts), vectors, collection)
        return LlamaIndexIngestionImporter(**options)

    def recipe(self, importer: Any) -> Recipe:
        options = {"url": self.server.url, "collection": importer._store._collection, "line_breaks": "kept"}
        return Recipe(LlamaIndexIngestionImporter, options)

    def missing(self) -> tuple[LlamaIndexIngestionImporter, str]:
        url = f"redis://user:hunter2@127.0.0.1:{find_free_port()}"
        return LlamaIndexIngestionImporter(url=url), "127.0.0.1"
