"""Providers count tokens with their own tokenizers, from files on this machine, or not at all."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import skip_missing

from embedonce import Cache
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider

pytest.importorskip("openai", reason="pip install openai")
pytest.importorskip("tiktoken", reason="pip install tiktoken")
from embedonce_providers import _openai_tokens
from embedonce_providers.openai import OpenAIProvider

URL = "https://tables.invalid/cl100k_base.tiktoken"
MODEL = "text-embedding-3-small"


# --- openai -----------------------------------------------------------------------------------


def make_openai(**options: Any) -> OpenAIProvider:
    return OpenAIProvider(**{"model": MODEL, "api_key": "test", **options})


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def download(*args: object) -> bytes:
        raise AssertionError("tiktoken would download a table")

    monkeypatch.setattr("tiktoken.load.read_file", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tables"))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    _openai_tokens._load_encoding.cache_clear()
    yield
    _openai_tokens._load_encoding.cache_clear()


def write_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small table in tiktoken's format, and make tiktoken's constructor of the encoding use it."""
    from tiktoken_ext import openai_public

    tokens = [bytes([byte]) for byte in range(256)] + [b"te", b"tea", b" tea"]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / hashlib.sha1(URL.encode()).hexdigest()
    file.write_bytes(content)
    parts = {"url": URL, "hash": hashlib.sha256(content).hexdigest()}
    source = f"""
def cl100k_base():
    ranks = load_tiktoken_bpe({parts["url"]!r}, expected_hash={parts["hash"]!r})
    special = {{ENDOFTEXT: 300}}
    return {{"name": "small", "pat_str": r" ?[a-z]+|.", "mergeable_ranks": ranks, "special_tokens": special}}
"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "cl100k_base", namespace["cl100k_base"])
    return file


def test_openai_counts_with_a_table_in_tiktokens_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    texts = ["tea", "tea tea", "", "富", "<|endoftext|>", "te\ud83d".encode("utf-8", "replace").decode()]
    counted = make_openai().count_exact_tokens(texts, "document")
    assert counted == [1, 2, 0, 3, 12, 2]


def test_the_prefix_of_a_task_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    provider = make_openai(prefixes={"query": "tea ", "document": ""})
    assert provider.count_exact_tokens(["tea"], "document") == [1]
    assert provider.count_exact_tokens(["tea"], "query") == [2]


def test_tiktokens_variables_name_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "gym", monkeypatch)
    write_table(tmp_path / "temp" / "data-gym-cache", monkeypatch)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "gym"))
    assert _openai_tokens._find_folder() == tmp_path / "gym"
    monkeypatch.delenv("DATA_GYM_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    assert make_openai().count_exact_tokens(["tea"], "document") == [1]
    _openai_tokens._load_encoding.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert make_openai().count_exact_tokens(["tea"], "document") is None


def test_a_missing_or_damaged_table_is_neither_used_nor_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert make_openai().count_exact_tokens(["tea"], "document") is None
    file = write_table(tmp_path / "tables", monkeypatch)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert make_openai().count_exact_tokens(["tea"], "document") is None
    assert file.exists()
    file.write_bytes(content)
    assert make_openai().count_exact_tokens(["tea"], "document") == [1], "a table that arrives later is used"


@pytest.mark.parametrize(
    ("options", "is_counted"),
    [
        ({}, True),
        ({"base_url": "https://api.openai.com/v1/"}, True),
        ({"base_url": "https://eu.api.openai.com/v1"}, True),
        ({"azure_endpoint": "https://me.openai.azure.com", "api_version": "1", "deployment": "mine"}, True),
        ({"base_url": "http://127.0.0.1:1/v1"}, False),
        ({"base_url": "https://api.openai.com.example.org/v1"}, False),
        ({"model": "nomic-embed-text"}, False),
        ({"model": "gpt2"}, False),
    ],
)
def test_only_openais_models_at_openai_or_azure_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: Mapping[str, Any], is_counted: bool
) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    assert make_openai(**options).count_exact_tokens(["tea"], "document") == ([1] if is_counted else None)


def test_an_endpoint_of_the_environment_is_not_openais(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert make_openai().count_exact_tokens(["tea"], "document") is None


def test_openai_without_tiktoken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tiktoken" else find_spec(name))
    assert make_openai().count_exact_tokens(["tea"], "document") is None


def test_a_tiktoken_that_loads_tables_in_another_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    def make() -> Mapping[str, Any]:
        raise AssertionError("this may download a table")

    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "cl100k_base", make)
    assert make_openai().count_exact_tokens(["tea"], "document") is None


def test_the_real_table_of_openais_models(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("llama_index.core") if importlib.util.find_spec("llama_index") else None
    if spec is None or spec.origin is None:
        skip_missing("llama-index-core, which brings a table of tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(spec.origin).parent / "_static" / "tiktoken_cache"))
    counted = make_openai().count_exact_tokens(["Tea is ready.", "富士山", "<|endoftext|>", "a" * 100_000], "document")
    assert counted == [5, 5, 7, 12_500]


def test_an_estimate_with_openais_tokenizer_sends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path / "tables", monkeypatch)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Cache(make_openai(api_key=None), [MemoryBackend()], price="3 EUR / 1 token") as cache:
        found = cache.estimate(["tea", "tea tea", "tea"])
    assert (found.method, found.tokens, found.max_money) == ("counted", 3, 9)


# --- sentence-transformers --------------------------------------------------------------------

TEXTS = ["Open a file.", "again " * 400, "", "Öffne die Datei. 富士山 🧪 [CLS]", "ÀÉÎ İstanbul", "  x\n\ty"]


def make_local(folder: Path, **options: Any) -> Any:
    from embedonce_providers.sentence_transformers import SentenceTransformersProvider

    return SentenceTransformersProvider(model=str(folder), device="cpu", **options)


def copy_tokenizer(minilm_path: Path, folder: Path, **settings: Any) -> Path:
    """Make a model without weights, which can count tokens but cannot be loaded."""
    folder.mkdir(parents=True)
    for name in ("modules.json", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_path / name, folder)
    shutil.copytree(minilm_path / "1_Pooling", folder / "1_Pooling")
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.timeout(300)
def test_a_model_counts_the_tokens_that_it_reads(minilm_path: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_path), device="cpu", local_files_only=True)
    for length, prompt in ((None, ""), (10, "passage: ")):
        if length is not None:
            model.max_seq_length = length
        tokenized = model.preprocess([prompt + text for text in TEXTS])
        expected = tokenized["attention_mask"].sum(axis=1).tolist()
        provider = make_local(minilm_path, max_length=length, document_prompt=prompt)
        assert provider.count_exact_tokens(TEXTS, "document") == expected
        assert provider._model is None
    saved = tmp_path / "saved"
    model.save(str(saved))
    expected = model.preprocess(TEXTS)["attention_mask"].sum(axis=1).tolist()
    assert make_local(saved).count_exact_tokens(TEXTS, "document") == expected
    assert max(expected) == 10, "the library saves the maximum"


def test_counting_needs_no_weights(minilm_path: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(minilm_path, tmp_path / "model", max_seq_length=8)
    provider = make_local(folder)
    assert provider.count_exact_tokens(["Open a file.", "again " * 400], "document") == [6, 8]
    with Cache(provider, [MemoryBackend()]) as cache:
        found = cache.estimate(["Open a file.", "again " * 400])
    assert (found.method, found.tokens) == ("counted", 14)
    assert provider._token_counter is None, "close frees the tokenizer"


def test_counting_imports_neither_torch_nor_transformers(minilm_path: Path) -> None:
    import subprocess

    program = (
        "import sys; from embedonce_providers.sentence_transformers import SentenceTransformersProvider as P; "
        f"print(P(model={str(minilm_path)!r}).count_exact_tokens(['Open a file.'], 'query'), "
        "'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[6] False False"


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 402),
        ({"max_seq_length": 12, "do_lower_case": True}, 12),
        ({"modality_config": {"text": {"method": "forward"}}, "query_length": None}, 402),
        ({"modality_config": {"message": {"method": "forward"}}}, None),
        ({"tokenizer_name_or_path": "other/model"}, None),
        ({"processing_kwargs": {"text": {"padding": True}}}, None),
    ],
)
def test_which_settings_of_a_model_are_known(
    minilm_path: Path, tmp_path: Path, settings: Mapping[str, Any], tokens: int | None
) -> None:
    folder = copy_tokenizer(minilm_path, tmp_path / "model", **settings)
    counted = make_local(folder).count_exact_tokens(["again " * 400], "document")
    assert counted == (None if tokens is None else [tokens])


@pytest.mark.parametrize("damage", ["missing", "invalid", "another module", "invalid settings"])
def test_a_model_whose_tokenizer_cannot_be_read_is_not_counted(minilm_path: Path, tmp_path: Path, damage: str) -> None:
    folder = copy_tokenizer(minilm_path, tmp_path / "model")
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "invalid":
        (folder / "tokenizer.json").write_text("{")
    elif damage == "invalid settings":
        (folder / "sentence_bert_config.json").write_text("[")
    else:
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["type"] = "custom.Module"
        (folder / "modules.json").write_text(json.dumps(modules))
    assert make_local(folder).count_exact_tokens(["text"], "document") is None


# --- the others -------------------------------------------------------------------------------


def test_ngram_charges_nothing() -> None:
    assert NgramProvider().count_exact_tokens(["", "text"], "document") == [0, 0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3.0, 4.0], [3, 4]),
        ([3.0, None], [3, None]),
        ([None, None], None),
        ([float("nan"), 2.0], [None, 2]),
        ([float("inf"), 2.0], [None, 2]),
    ],
)
def test_the_tokens_of_vertex_ai_belong_to_their_texts(counts: list[float | None], expected: Any) -> None:
    pytest.importorskip("google.genai", reason="pip install google-genai")
    from google.genai import types

    from embedonce_providers.gemini import GeminiProvider

    embeddings = [
        types.ContentEmbedding(
            values=[1.0, 2.0], statistics=None if count is None else types.ContentEmbeddingStatistics(token_count=count)
        )
        for count in counts
    ]
    answer = GeminiProvider(model="m", api_key="k")._read_answer(types.EmbedContentResponse(embeddings=embeddings), 2)
    assert answer.tokens == expected
    assert np.asarray(answer.vectors).shape == (2, 2)
