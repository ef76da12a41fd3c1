"""Names that say what an embedder keeps in a field: a model, a secret, a client, or a setting that decides nothing."""

from __future__ import annotations

import re
from typing import Final

NOT_IN_SPACE: Final = frozenset(
    {
        # Connections and accounts. A model returns the same vectors to every account. This list does not contain
        # `location` and `project` of Vertex AI or `project_id` of watsonx, because two projects may use one name for
        # different models. It contains the AWS region, because a model id of Bedrock includes the model's version.
        "additional_headers",
        "aiosession",
        "api_key_env",
        "api_key_env_var",
        "api_key_env_variable",
        "api_version",
        "async_http_client",
        "aws_region",
        "aws_region_name",
        "boto3_config",
        "boto_config",
        "botocore_config",
        "botocore_session",
        "client_name",
        "client_options",
        "connection_timeout",
        "credentials_profile_name",
        "custom_headers",
        "default_headers",
        "extra_headers",
        "headers",
        "headers_tmpl",
        "http_async_client",
        "http_client",
        "http_headers",
        "httpx_async_client",
        "httpx_client",
        "keep_alive",
        "listing_path",
        "openai_api_version",
        "openai_organization",
        "openai_proxy",
        "org",
        "org_id",
        "organization",
        "organization_id",
        "polling_url_tmpl",
        "profile_name",
        "proxies",
        "proxy",
        "proxy_url",
        "region_name",
        "reuse_client",
        "session",
        "ssl_verify",
        "trust_env",
        "use_async_client",
        "user",
        "user_agent",
        "user_id",
        "validate_base_url",
        "validate_model_on_init",
        "verify",
        "verify_ssl",
        # how many texts a call holds, how many calls run at the same time, and what happens if a call fails
        "batch_size",
        "batch_token_limit",
        "chunk_size",
        "concurrency",
        "concurrent_requests",
        "embed_batch_size",
        "embedding_batch_size",
        "interval",
        "max_batch_size",
        "max_concurrency",
        "max_concurrent_requests",
        "max_retries",
        "max_retry_delay",
        "max_tokens_per_batch",
        "max_workers",
        "min_retry_delay",
        "multi_process",
        "n_batch",
        "n_threads",
        "n_threads_batch",
        "num_batch",
        "num_retries",
        "num_thread",
        "num_threads",
        "num_workers",
        "parallel",
        "parallelism",
        "pool_size",
        "progress_bar_kwargs",
        "raise_on_failure",
        "rate_limit",
        "rate_limiter",
        "request_timeout",
        "requests_per_minute",
        "requests_per_second",
        "retries",
        "retry",
        "retry_delay",
        "retry_exponential_base",
        "retry_max_seconds",
        "retry_min_seconds",
        "retry_policy",
        "rpm",
        "semaphore",
        "stop_after_attempt",
        "thread_pool_size",
        "threads",
        "timeout",
        "timeout_seconds",
        "tokens_per_minute",
        "tpm",
        "wait_time",
        # the machine
        "cache_dir",
        "cache_folder",
        "cuda",
        "device",
        "device_ids",
        "device_map",
        "download_dir",
        "lazy_load",
        "local_files_only",
        "low_vram",
        "main_gpu",
        "n_gpu_layers",
        "num_gpu",
        "numa",
        "offload_kqv",
        "preferred_providers",
        "providers",
        "target_device",
        "target_devices",
        "tensor_split",
        "use_mlock",
        "use_mmap",
        # what an embedder writes down while it works
        "call_count",
        "calls",
        "count",
        "embedding_backend",
        "initialized",
        "is_initialized",
        "is_loaded",
        "is_warm",
        "is_warmed_up",
        "last_inputs",
        "last_response",
        "n_calls",
        "num_calls",
        "token_count",
        "token_counter",
        "token_usage",
        "total_tokens",
        "warmed_up",
        # caches, logs, traces and progress
        "cache",
        "callback_manager",
        "callbacks",
        "custom_get_token_ids",
        "debug",
        "disable_tqdm",
        "document_embedding_store",
        "embeddings_cache",
        "log_level",
        "logger",
        "metrics",
        "progress_bar",
        "query_embedding_store",
        "show_progress",
        "show_progress_bar",
        "telemetry",
        "tracer",
        "tracing",
        "usage_telemetry_enabled",
        "verbose",
        # how the answer is encoded on its way
        "encoding_format",
        # what a package says about its models, or offers besides embeddings
        "default_hosted_model_name",
        "deprecated",
        "get_asession_fn",
        "get_session_fn",
        "supports_structured_output",
        "supports_thinking",
        "supports_tools",
    }
)
"""Names of settings that cannot change a vector. Leading underscores do not count: ``_timeout`` is ``timeout``."""

MODEL_FIELDS: Final = (
    "model",
    "model_name",
    "model_id",
    "repo_id",
    "azure_deployment",
    "deployment",
    "deployment_name",
    "model_deployment_name",
    "embedding_model_name",
    "model_name_or_path",
    "MODEL_NAME",
)
"""Names of the fields in which embedders keep the name of their model."""

NO_MODEL: Final = ("", "unknown")
"""Values of such a field that name no model."""

ENDPOINT_FIELDS: Final = frozenset(
    {"api_base", "api_base_url", "api_endpoint", "api_url", "azure_endpoint", "base_url", "endpoint", "endpoint_url"}
    | {"openai_api_base", "url"}
)
"""Names of the fields in which embedders keep the URL of their endpoint."""

CLIENT_PACKAGES: Final = frozenset(
    {"aiobotocore", "aiohttp", "anthropic", "azure", "boto3", "botocore", "cohere", "google", "grpc", "httpcore"}
    | {"httpcore2", "httpx", "httpx2", "huggingface_hub", "mistralai", "ollama", "openai", "requests", "urllib3"}
    | {"voyageai"}
)
"""Packages whose objects, except values such as a request's options, are connections to a service."""

CLIENT_SETTINGS: Final = frozenset(
    {"custom_query", "dimensions", "input_type", "model", "model_extras", "model_id", "output_dimensionality"}
    | {"default_query", "default_body", "extra_body", "provider", "truncate"}
)
"""Names of fields of such a connection that go to the model with every request."""

MACHINERY: Final = frozenset(
    {"_asyncio", "_contextvars", "_io", "_queue", "_random", "_thread", "_weakref", "_weakrefset", "asyncio"}
    | {"backoff", "concurrent", "contextvars", "io", "logging", "loguru", "multiprocessing", "opentelemetry"}
    | {"prometheus_client", "queue", "random", "rich", "selectors", "socket", "ssl", "structlog", "tenacity"}
    | {"threading", "tqdm", "weakref"}
)
"""Packages whose objects hold no setting: locks, loggers, files, executors, queues, retry policies, progress bars."""

TOOLS: Final = (
    *("langchain_core.callbacks", "langchain_core.caches", "langchain_core.rate_limiters", "langchain_core.stores"),
    *("langchain_core.tracers", "llama_index.core.callbacks", "llama_index.core.rate_limiter"),
    *("llama_index.core.storage", "llama_index.core.instrumentation", "haystack.components.embedders.backends"),
    *("haystack_integrations.components.embedders", "haystack.tracing", "haystack.utils.auth", "itertools", "aioboto3"),
)
"""Modules of frameworks whose objects, under a name in :data:`NOT_IN_SPACE`, cannot change a vector."""

MODEL_PACKAGES: Final = frozenset(
    {"fastembed", "flax", "jax", "keras", "llama_cpp", "model2vec", "onnxruntime", "optimum", "sentence_transformers"}
    | {"sentencepiece", "tensorflow", "tiktoken", "tokenizers", "transformers", "transformers_modules"}
)
"""Packages whose objects are loaded models and tokenizers. The name of the model stands for them."""

SENTENCE_TRANSFORMER: Final = ("max_seq_length", "prompts", "default_prompt_name", "truncate_dim")
"""What can be changed on a loaded sentence transformer, besides its weights."""

_SECRET = re.compile(
    r"(^|_)((api|access|account|auth|encryption|license|private|signing|subscription"
    r"|azure|cohere|google|jina|mistral|nvidia|openai|voyage)_?key"
    r"|secret|passw(or)?d|passphrase|pwd|credentials?|auth|authorization|bearer|cookies?|jwt|sas"
    r"|(api|access|auth|ad|ad_async|bearer|hf|id|refresh|sas|session)_token)(_|$)"
)
_SECRET_NAMES: Final = frozenset({"key", "token"})
_SECRET_TEXT = re.compile(
    r"(Basic|Bearer) \S{8,}|(sk|pk)[-_][\w-]{16,}|(hf|jina|ghp|gsk)_\w{16,}|(nvapi|xai|pa)-[\w-]{16,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w.-]+"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PHRASE = re.compile(r"(^|_)(prompts?|prefix(es)?|suffix(es)?|instructions?|templates?)$")
_SETTINGS = re.compile(r"(kwargs|args|params|parameters|options|config|settings|body|query|headers)$")
_UNMISTAKABLE = frozenset({"callbacks", "cookies", "headers", "proxies", "retries", "timeout", "verbose"})
_RECORD = re.compile(
    r"counts?|counters?|calls|num_calls|totals?(_.*)?|usage|tokens_used|used|seen|history|logs?|records?|stats"
    r"|statistics|requests|hits|misses|spent|elapsed|timings?|costs?|metrics|.*_(count|total|calls)"
)


def to_plain_name(name: str) -> str:
    """Return a name as these lists spell it: ``batch_size`` for ``_batch_size``, ``batchSize`` and ``batch-size``."""
    return _CAMEL.sub("_", name).lower().replace("-", "_").replace(" ", "_").strip("_")


def decides_nothing(name: str) -> bool:
    """Return whether a setting of this name cannot change a vector."""
    return name.strip("_") in NOT_IN_SPACE or to_plain_name(name) in NOT_IN_SPACE


def is_secret(name: str) -> bool:
    """Return whether a field of this name holds a secret: ``api_key``, ``openaiApiKey``, ``x-api-key``, ``_token``."""
    plain = to_plain_name(name)
    return plain in _SECRET_NAMES or (_SECRET.search(plain) is not None and not holds_phrases(name))


def looks_secret(text: str) -> bool:
    """Return whether a text has the form of a well-known kind of key, such as ``sk-...`` or ``Bearer ...``."""
    return _SECRET_TEXT.fullmatch(text) is not None


def holds_phrases(name: str) -> bool:
    """Return whether a field of this name holds texts that go to the model: prompts, prefixes, instructions."""
    return _PHRASE.search(to_plain_name(name)) is not None


def holds_settings(name: str) -> bool:
    """Return whether the keys of a mapping of this name are names of settings. Otherwise they are a user's data."""
    return _SETTINGS.search(to_plain_name(name)) is not None


def is_unmistakable(name: str) -> bool:
    """Return whether a listed name is the name of a setting even as a key of a user's data, as ``max_retries`` is.

    A single word, such as ``user``, may be one of the user's own words.
    """
    plain = to_plain_name(name)
    return "_" in plain or plain in _UNMISTAKABLE


def is_record(name: str) -> bool:
    """Return whether an embedder writes down under this name what it does, such as the number of its calls."""
    return _RECORD.fullmatch(to_plain_name(name)) is not None
