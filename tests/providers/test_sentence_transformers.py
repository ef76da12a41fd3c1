"""Tests for the ``sentence-transformers`` provider with a real model: its vectors, its spaces, and when it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import Hub

import embedonce
from embedonce import Tier, model_files
from embedonce.errors import ConfigError, PluginError, SpaceError, TextRefused
from embedonce.testing import ProviderContract
from embedonce.testing.contracts.support import run_in_fork

pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend
from embedonce_providers._model_folder import read_description
from embedonce_providers.sentence_transformers import SentenceTransformersProvider, _ModelSource

NAME = "sentence-transformers/all-MiniLM-L6-v2"
COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
TOLERANCE = 1e-6
# The first test and each started process import torch, which takes a long time on a busy machine.
pytestmark = pytest.mark.timeout(300)
starts_a_process = pytest.mark.timeout(500)
TEXTS = ["Open a file.", "Close it again, and say whether that went well. " * 40, "", "Öffne die Datei."]


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def minilm(minilm_path: Path) -> Any:
    """Return MiniLM from the library itself, loaded once for all tests of this process."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_path), device="cpu", local_files_only=True)


class Shared(SentenceTransformersProvider):
    """Uses the model that the tests have already loaded."""

    ready: Any = None

    def _load_model(self) -> Any:
        return self.ready


@pytest.fixture
def shared(minilm: Any) -> Iterator[type[Shared]]:
    Shared.ready = minilm
    yield Shared
    minilm.max_seq_length = 256


def copy_small_files(minilm_path: Path, folder: Path, **config: Any) -> Path:
    """Make a folder that describes MiniLM but has fake weights."""
    folder.mkdir(parents=True)
    for name in ("modules.json", "config.json", "sentence_bert_config.json"):
        shutil.copy(minilm_path / name, folder)
    shutil.copytree(minilm_path / "1_Pooling", folder / "1_Pooling")
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights" * 300_000)
    return folder


def fingerprint(folder: Path | str, task: str = "document", **options: Any) -> str:
    return SentenceTransformersProvider(model=str(folder), **options).space(task).fingerprint().hex()


class TestContract(ProviderContract):
    tolerance = TOLERANCE
    path: Path

    @pytest.fixture(autouse=True)
    def _path(self, minilm_path: Path, shared: type[Shared]) -> None:
        type(self).path = minilm_path

    def make(self) -> SentenceTransformersProvider:
        return Shared(model=str(self.path), device="cpu")


# --- vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "encode"),
    [
        ({}, {}),
        ({"truncate_dim": 100}, {"truncate_dim": 100}),
        ({"truncate_dim": 100, "normalize_embeddings": True}, {"truncate_dim": 100, "normalize_embeddings": True}),
        ({"document_prompt": "passage: "}, {"prompt": "passage: "}),
    ],
)
def test_the_vectors_are_those_of_plain_encode(
    minilm_path: Path, minilm: Any, options: dict[str, Any], encode: dict[str, Any]
) -> None:
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu", **options)
    vectors = provider.embed(TEXTS, "document")
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, provider.space("document").dimensions)
    np.testing.assert_allclose(vectors, minilm.encode(TEXTS, **encode), atol=TOLERANCE)


def test_queries_have_their_own_prompt(minilm_path: Path, minilm: Any, shared: type[Shared]) -> None:
    provider = shared(model=str(minilm_path), query_prompt="query: ", document_prompt="passage: ")
    for task, prompt in (("query", "query: "), ("document", "passage: ")):
        expected = minilm.encode([f"{prompt}{text}" for text in TEXTS])
        np.testing.assert_allclose(provider.embed(TEXTS, task), expected, atol=TOLERANCE)


def test_weights_of_another_precision(minilm_path: Path, minilm: Any) -> None:
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu", dtype="bfloat16")
    assert provider.space("document").precision == "bfloat16"
    vectors, whole = provider.embed(TEXTS, "document"), minilm.encode(TEXTS)
    assert not np.allclose(vectors, whole, atol=TOLERANCE)
    assert (np.sum(vectors * whole, axis=1) > 0.99).all()


def test_long_texts_are_cut_or_refused(minilm_path: Path, minilm: Any, shared: type[Shared]) -> None:
    texts = ["a " * 254, "a " * 255, "short", "a " * 300]
    provider = shared(model=str(minilm_path))
    assert provider.embed(texts, "document").shape == (4, 384)
    strict = shared(model=str(minilm_path), truncate="error")
    with pytest.raises(TextRefused) as refused:
        strict.embed(texts, "document")
    assert refused.value.positions == (1, 3)  # with [CLS] and [SEP], 254 words are 256 tokens
    assert "a a" not in str(refused.value)
    with embedonce.Cache(strict) as cache:
        assert sorted(cache.fetch(texts).failed) == [1, 3]
    prompted = shared(model=str(minilm_path), truncate="error", document_prompt="a a ")
    with pytest.raises(TextRefused) as refused:
        prompted.embed(texts, "document")
    assert refused.value.positions == (0, 1, 3), "the prompt's tokens count"


def test_max_length(minilm_path: Path) -> None:
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu", max_length=16)
    assert provider.space("document").max_length == 16
    long, cut = provider.embed(["a b c d e f g " * 9, "a b c d e f g " * 2], "document")
    np.testing.assert_allclose(long, cut, atol=TOLERANCE)


def test_a_text_without_a_vector_is_refused(tmp_path: Path) -> None:
    """A model that adds up the vectors of words has no vector for a text without words."""
    model = save_static_model(tmp_path / "static")
    provider = SentenceTransformersProvider(model=str(model), device="cpu")
    with pytest.raises(TextRefused) as refused:
        provider.embed(["one", "", "two"], "document")
    assert refused.value.positions == (1,)
    assert provider.embed(["one", "two"], "document").shape == (2, 8)
    assert provider.space("document").dimensions is None


def save_static_model(folder: Path, wrap: Callable[[Any], Any] = lambda module: module) -> Path:
    """Save a small model with a vector for each of three words, made of the library's own classes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="three"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    module = wrap(StaticEmbedding(tokenizer, embedding_weights=weights))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)
    return folder


def test_a_model_that_routes_by_task_is_not_symmetric(tmp_path: Path) -> None:
    from sentence_transformers.models import Router, StaticEmbedding

    def route(module: Any) -> Any:
        other = StaticEmbedding(module.tokenizer, embedding_weights=-module.embedding.weight.detach().numpy())
        return Router.for_query_document([module], [other])

    provider = SentenceTransformersProvider(model=str(save_static_model(tmp_path / "routed", route)), device="cpu")
    spaces = [provider.space(task) for task in ("query", "document")]
    assert [space.task for space in spaces] == ["query", "document"]
    assert spaces[0].fingerprint() != spaces[1].fingerprint()
    query, document = (provider.embed(["one two"], task) for task in ("query", "document"))
    np.testing.assert_allclose(query, -document, atol=TOLERANCE)


# --- the space --------------------------------------------------------------------------------


def test_minilm_is_symmetric_and_described_without_its_weights(minilm_path: Path) -> None:
    provider = SentenceTransformersProvider(model=str(minilm_path))
    space = provider.space("document")
    assert space.dimensions == 384
    assert space.fingerprint() == provider.space("query").fingerprint() == provider.space("anything").fingerprint()


def test_options_that_change_the_space(minilm_path: Path, tmp_path: Path) -> None:
    folder = copy_small_files(minilm_path, tmp_path / "model")
    options: list[dict[str, Any]] = [
        {},
        {"truncate_dim": 100},
        {"normalize_embeddings": True},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"document_prompt": "passage: "},
        {"max_length": 100},
        {"truncate": "error"},
        {"trust_remote_code": True},
    ]
    made = [fingerprint(folder, **each) for each in options]
    assert len(set(made)) == len(made)
    same: list[dict[str, Any]] = [
        {"device": "cpu"},
        {"batch_size": 7},
        {"query_prompt": "query: "},
        {"truncate_dim": 384},
        {"truncate_dim": 999},
        {"document_prompt": ""},
    ]
    assert {fingerprint(folder, **each) for each in same} == {made[0]}


def test_the_content_of_a_folder_decides_its_space(minilm_path: Path, tmp_path: Path) -> None:
    folder = copy_small_files(minilm_path, tmp_path / "model")
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "deep" / "copy")
    assert fingerprint(tmp_path / "deep" / "copy") == first, "a copy, with other times"
    (tmp_path / "link").symlink_to(folder)
    assert fingerprint(tmp_path / "link") == first
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert fingerprint(moved) == first

    for name in ("README.md", ".gitattributes", "onnx/model.onnx", "tf_model.h5"):
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_text("not what PyTorch reads")
    assert fingerprint(moved) == first

    seen = {first}
    for name in ("model.safetensors", "config.json", "1_Pooling/config.json", "tokenizer.json", "modeling.py"):
        with (moved / name).open("a") as file:
            file.write("\n")
        seen.add(fingerprint(moved))
    assert len(seen) == 6


def test_changed_weights_of_the_same_size_and_time_are_noticed(minilm_path: Path, tmp_path: Path) -> None:
    folder = copy_small_files(minilm_path, tmp_path / "model")
    weights = folder / "model.safetensors"
    os.utime(weights, (1e9, 1e9))
    before = fingerprint(folder)
    with weights.open("r+b") as file:
        file.seek(1_234_567)
        file.write(b"!")
    os.utime(weights, (1e9, 1e9))
    assert fingerprint(folder) != before


def test_large_files_are_hashed_once(minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copy_small_files(minilm_path, tmp_path / "model")
    hashed: list[str] = []
    original = model_files.hashlib.file_digest

    def count(stream: Any, name: str) -> Any:
        hashed.append(Path(stream.name).name)
        return original(stream, name)

    monkeypatch.setattr(model_files.hashlib, "file_digest", count)
    monkeypatch.setattr(model_files, "SETTLED", 3600.0)  # treat the file as just written, however slow this machine is
    fingerprint(folder)
    fingerprint(folder)
    assert hashed.count("model.safetensors") == 2, "a change of a file that was just written might leave no trace"
    monkeypatch.setattr(model_files, "SETTLED", -1.0)
    first = fingerprint(folder)
    hashed.clear()
    assert fingerprint(folder) == first
    assert "model.safetensors" not in hashed
    (memo,) = (tmp_path / "cache").rglob("model-files.json")
    memo.write_text("no JSON")
    assert fingerprint(folder) == first
    assert hashed.count("model.safetensors") == 1


def test_a_folder_that_changes_before_loading_is_an_error(minilm_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm_path, folder)
    provider = SentenceTransformersProvider(model=str(folder), device="cpu")
    with embedonce.Cache(provider) as cache:
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
        with pytest.raises(SpaceError, match="has changed since the cache was opened"):
            cache.embed("a text")


def test_the_prompts_of_the_model_are_used(minilm_path: Path, tmp_path: Path) -> None:
    prompts = {"query": "Q: ", "document": "D: ", "clustering": "C: "}
    folder = copy_small_files(minilm_path, tmp_path / "model", prompts=prompts, default_prompt_name="clustering")
    provider = SentenceTransformersProvider(model=str(folder))
    prompts_by_task = {task: provider.space(task).prompt for task in ("query", "document", "clustering", "other")}
    assert prompts_by_task == {"query": "Q: ", "document": "D: ", "clustering": "C: ", "other": "C: "}
    named = SentenceTransformersProvider(model=str(folder), query_prompt_name="clustering", document_prompt="")
    assert named.space("query").prompt == "C: "
    assert named.space("document").prompt is None
    unknown = SentenceTransformersProvider(model=str(folder), query_prompt_name="querry")
    with pytest.raises(SpaceError, match=r"no prompt named 'querry'; its prompts: clustering, document, query"):
        unknown.space("query")


def test_a_misspelled_task_is_refused(minilm_path: Path, tmp_path: Path) -> None:
    plain = SentenceTransformersProvider(model=str(minilm_path))
    assert plain.space("classification") == plain.space("document")
    prompted = copy_small_files(minilm_path, tmp_path / "model", prompts={"query": "Q: ", "clustering": "C: "})
    with pytest.raises(SpaceError, match='did you mean "query"'):
        plain.space("qurey")
    with pytest.raises(SpaceError, match='did you mean "clustering"'):
        SentenceTransformersProvider(model=str(prompted)).space("clusterng")
    with pytest.raises(SpaceError, match="does not know the task"):
        SentenceTransformersProvider(model=str(prompted)).space("else")


# --- folders of a configuration ---------------------------------------------------------------


def write_configuration(folder: Path, model: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "embedonce.toml"
    path.write_text(f'[provider]\ntype = "sentence-transformers"\nmodel = "{model}"\n[[tiers]]\ntype = "memory"\n')
    return path


@pytest.mark.parametrize("model", ["mymodel", "./mymodel", "models/mymodel", "../outside"])
def test_a_relative_folder_is_relative_to_the_file(
    minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    path = write_configuration(tmp_path / "project", model)
    folder = copy_small_files(minilm_path, path.parent / model)
    expected = SentenceTransformersProvider(model=str(folder)).space("document")
    (path.parent / "sub").mkdir()
    for place in (path.parent / "sub", tmp_path):
        monkeypatch.chdir(place)
        with embedonce.open(path) as cache:
            assert cache.provider is not None
            assert cache.provider.space("document") == expected


@pytest.mark.parametrize("model", ["mymodel", "owner/mymodel"])
def test_a_folder_of_the_working_directory_is_not_used_for_a_file(
    minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write_configuration(tmp_path / "project", model)
    copy_small_files(minilm_path, tmp_path / "elsewhere" / model)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert SentenceTransformersProvider(model=model).space("query").model.startswith("folder:")
    with pytest.raises(embedonce.EmbedonceError, match="mymodel") as caught, embedonce.open(path) as cache:
        cache.explain("a")
    assert "hub" in str(caught.value).lower()


def test_a_missing_folder_is_named_with_its_path(tmp_path: Path) -> None:
    path = write_configuration(tmp_path / "project", "./mymodel")
    with (
        pytest.raises(embedonce.EmbedonceError, match="neither a folder that exists") as caught,
        embedonce.open(path) as cache,
    ):
        cache.explain("a")
    assert str(tmp_path / "project" / "mymodel") in str(caught.value)


def test_prompts_are_chosen_like_in_the_library(minilm_path: Path, tmp_path: Path) -> None:
    """The expected vectors come from the library itself, with the same files."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    shutil.copytree(minilm_path, folder)
    config = {"prompts": {"query": "Q: ", "passage": "P: ", "x": "X: "}, "default_prompt_name": "x"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    plain = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    provider = SentenceTransformersProvider(model=str(folder), device="cpu")
    for task, encode in (("query", plain.encode_query), ("document", plain.encode_document), ("y", plain.encode)):
        np.testing.assert_allclose(provider.embed(TEXTS, task), encode(TEXTS), atol=TOLERANCE)


def test_dimensions_follow_the_last_module(minilm_path: Path, tmp_path: Path) -> None:
    folder = copy_small_files(minilm_path, tmp_path / "model", truncate_dim=200)

    def dimensions(**options: Any) -> tuple[int | None, Any]:
        space = SentenceTransformersProvider(model=str(folder), **options).space("document")
        return space.dimensions, space.extra

    assert dimensions() == (200, None)
    assert dimensions(truncate_dim=300) == (300, None)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 384, "out_features": 64}')
    assert dimensions() == (64, None)
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense | {"type": "custom.Module"}]))
    assert dimensions() == (None, {"truncate_dim": 200})
    both = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(both))
    assert dimensions()[0] is None, "the results of cls and mean are concatenated"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/folder"}, "model 'no/such/folder' is neither a folder that exists nor a valid name"),
        ({"model": "../model"}, "nor a valid name"),
        ({"model": "owner/never-downloaded"}, r"not in the local cache .*hf download owner/never-downloaded"),
        ({"model": "owner/never", "revision": "../../x"}, "a branch, a tag or a commit"),
    ],
)
def test_missing_models_are_errors(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpaceError, match=f"(?s){message}"):
        SentenceTransformersProvider(**options).space("document")


def test_folders_without_a_model_are_errors(minilm_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"holds no model: it has neither modules\.json"):
        fingerprint(tmp_path)
    folder = copy_small_files(minilm_path, tmp_path / "model")
    with pytest.raises(SpaceError, match="model is a folder; remove revision"):
        fingerprint(folder, revision="main")
    (folder / "modules.json").write_text("{}")
    with pytest.raises(SpaceError, match=r"modules\.json is invalid: expected a JSON array"):
        fingerprint(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(SpaceError, match=r"cannot read the model's .*modules\.json"):
        fingerprint(folder)


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be used together"):
        SentenceTransformersProvider(model="m", query_prompt="q", query_prompt_name="query")
    with pytest.raises(ConfigError, match="model is empty"):
        SentenceTransformersProvider(model="")
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        SentenceTransformersProvider(model="m", batch_size=0)


# --- the hub ----------------------------------------------------------------------------------


def fill_hub_cache(source: Path, cache: Path, name: str = NAME, *refs: str) -> None:
    """Store a model's files in the layout of the Hugging Face client."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / COMMIT, symlinks=True)
    (folder / "refs").mkdir()
    for ref in refs:
        (folder / "refs" / ref).write_text(COMMIT)


def test_spellings_of_one_model_are_one_space(
    minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    fill_hub_cache(copy_small_files(minilm_path, tmp_path / "model"), tmp_path / "hub", NAME, "main", "v2")
    spellings: list[dict[str, Any]] = [
        {"model": NAME},
        {"model": "all-MiniLM-L6-v2"},
        {"model": NAME, "revision": "main"},
        {"model": NAME, "revision": "v2"},
        {"model": "all-MiniLM-L6-v2", "revision": COMMIT},
    ]
    spaces = [SentenceTransformersProvider(**each).space("document") for each in spellings]
    assert len({space.fingerprint() for space in spaces}) == 1
    assert (spaces[0].model, spaces[0].revision, spaces[0].dimensions) == (NAME, COMMIT, 384)


SCRIPT = """
import json, sys
import embedonce
cache = embedonce.open({
    "provider": {"type": "sentence-transformers", "model": sys.argv[1], "device": "cpu"},
    "tiers": [{"type": "disk", "path": sys.argv[2], "timeout": "60s"}],
})
with cache:
    vectors = cache.embed_batch(json.loads(sys.argv[3]))
    print(json.dumps({
        "computed": cache.stats().providers["sentence-transformers"].texts,
        "loaded": sorted({"torch", "sentence_transformers", "transformers", "httpx2"} & set(sys.modules)),
        "first": vectors[0].tolist(),
    }))
"""


def make_patient_disk(folder: Path) -> Tier:
    """Return a disk tier with a timeout that is long enough for a busy machine."""
    return Tier(DiskBackend(path=folder), timeout=60.0)


def run(model: Path | str, folder: Path, texts: list[str], **environ: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(model), str(folder), json.dumps(texts)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@starts_a_process
def test_a_warm_run_loads_nothing(minilm_path: Path, shared: type[Shared], tmp_path: Path) -> None:
    with embedonce.Cache(shared(model=str(minilm_path)), [make_patient_disk(tmp_path / "vectors")]) as cache:
        cold = cache.embed_batch(TEXTS)
    warm = run(minilm_path, tmp_path / "vectors", TEXTS)
    assert (warm["computed"], warm["loaded"]) == (0, [])
    assert warm["first"] == cold[0].tolist()


@starts_a_process
def test_a_model_of_the_hub(minilm_path: Path, minilm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client downloads from a hub on loopback once. Later runs make no request, and also work offline."""
    home = tmp_path / "home"
    with Hub(minilm_path, NAME, COMMIT) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        cold = run("all-MiniLM-L6-v2", tmp_path / "vectors", TEXTS, **online)
        assert any(path.endswith("/revision/main") for path in hub.requests)
        hub.requests.clear()
        warm = run("all-MiniLM-L6-v2", tmp_path / "vectors", TEXTS, **online)
        assert hub.requests == []
    assert (cold["computed"], warm["computed"], warm["loaded"]) == (4, 0, [])
    np.testing.assert_allclose(cold["first"], minilm.encode(TEXTS)[0], atol=TOLERANCE)

    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(home / "hub"))
    provider = SentenceTransformersProvider(model=NAME, device="cpu")
    with embedonce.Cache(provider, [make_patient_disk(tmp_path / "vectors")]) as cache:
        assert cache.fetch([*TEXTS, "one more"]).sources == ["disk"] * 4 + ["provider"]


# --- loading ----------------------------------------------------------------------------------


def test_the_model_is_loaded_at_the_first_miss_and_runs_only_for_misses(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    original = SentenceTransformersProvider._load_model
    monkeypatch.setattr(SentenceTransformersProvider, "_load_model", lambda self: loads.append(1) or original(self))
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu", batch_size=4)
    forwards: list[int] = []
    with embedonce.Cache(provider, [MemoryBackend()]) as cache:
        assert loads == []
        first = cache.embed_batch(TEXTS)
        assert loads == [1]
        assert provider._model is not None
        provider._model.register_forward_hook(lambda *_: forwards.append(1))
        assert (cache.embed_batch(TEXTS * 3)[: len(TEXTS)] == first).all()
        assert (cache.embed(TEXTS[0], task="query") == first[0]).all(), "a symmetric model has one space"
        assert forwards == []
        cache.embed_batch([*TEXTS, "new 1", "new 2", "new 1"])
        assert forwards == [1]
    assert loads == [1]
    assert provider._model is None


def test_prepare_loads_the_model_for_the_first_call(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    monkeypatch.setattr(SentenceTransformersProvider, "_load_model", lambda self: loads.append(1) or object())
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu")
    provider.prepare()
    model = provider._model
    provider.prepare()
    assert provider._get_model() is model
    assert loads == [1]


def test_prepare_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SentenceTransformersProvider) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SentenceTransformersProvider, "_load_model", fail)
    provider = SentenceTransformersProvider(model=NAME)
    provider._source = _ModelSource(NAME, COMMIT, tmp_path, is_on_hub=True, description=read_description(tmp_path))
    provider.prepare()


def test_threads_load_it_once(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    original = SentenceTransformersProvider._load_model
    monkeypatch.setattr(SentenceTransformersProvider, "_load_model", lambda self: loads.append(1) or original(self))
    provider = SentenceTransformersProvider(model=str(minilm_path), device="cpu")
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = provider.embed([TEXTS[number % 4]], "document")[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]
    for number in range(4):
        np.testing.assert_allclose(found[number], found[number + 4], atol=TOLERANCE)


def test_a_forked_child_embeds(minilm_path: Path, shared: type[Shared]) -> None:
    """OpenMP's threads exist only in the parent, and a child must not wait for them, even if another thread embeds."""
    provider = shared(model=str(minilm_path))
    expected = provider.embed(["some words " * 30] * 64, "document")

    def work() -> None:
        np.testing.assert_allclose(provider.embed(["some words " * 30] * 64, "document"), expected, atol=TOLERANCE)

    with provider._lock:  # as if a thread were in the middle of a call
        run_in_fork(work, "embed")
    work()


INTERRUPTED_SCRIPT = """
import signal, sys, threading, time
from embedonce_providers.sentence_transformers import SentenceTransformersProvider
import sentence_transformers_gate
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell have no handler
provider = SentenceTransformersProvider(model=sys.argv[1], device="cpu")
try:
    provider.embed(["a text"], "document")
except KeyboardInterrupt:
    print("interrupted", "torch" in sys.modules, flush=True)
print(provider.embed(["a text"], "document").shape, flush=True)
"""


@starts_a_process
def test_ctrl_c_while_loading_breaks_nothing(minilm_path: Path, tmp_path: Path) -> None:
    """The signal arrives while torch is half imported. If it stopped the import, the process could not recover."""
    (tmp_path / "sentence_transformers_gate.py").write_text(
        "import os, signal, sys\n"
        "class Gate:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch.nn':\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Gate())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED_SCRIPT, str(minilm_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted True", "(1, 384)"]


def test_a_failed_load_is_retried(minilm_path: Path, minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = SentenceTransformersProvider(model=str(minilm_path), device="no-such-device")
    with embedonce.Cache(provider) as cache:
        with pytest.raises(RuntimeError, match="no-such-device"):
            cache.embed("a text")
        monkeypatch.setattr(provider, "_device", "cpu")
        assert cache.embed("a text").shape == (384,)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce import plugins

    monkeypatch.setattr("embedonce._plugins.loading._plugins", {})
    monkeypatch.delitem(sys.modules, "embedonce_providers.sentence_transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(
        PluginError, match=r"needs sentence_transformers.*pip install 'embedonce\[sentence-transformers\]'"
    ):
        plugins.provider("sentence-transformers")
