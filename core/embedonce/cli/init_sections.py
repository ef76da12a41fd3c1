"""The text of the file that ``embedonce init`` writes: one section per provider, per tier, and for the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the file, with its comments. An option that is commented out is valid once its ``#`` is removed."""

    comment: str
    """Description of the provider, the tier or the server, as lines of TOML comment."""
    table: str
    extra: str | None = None
    """Name of the extra of embedonce that must be installed, or None."""
    variables: tuple[str, ...] = ()
    """Environment variables that the table requires, because they have no default."""

    def render(self) -> str:
        """Return the section as TOML, with the command that installs the extra."""
        install = f"# Requires: {format_install_command([self.extra])}\n" if self.extra else ""
        return f"{self.comment}{install}{self.table}"


def format_install_command(extras: Sequence[str]) -> str:
    """Return the command that installs some extras of embedonce."""
    return f"pip install 'embedonce[{','.join(extras)}]'"


_HEAD = """\
# embedonce: embed each text once.
# `embedonce check` tests this file and `embedonce schema` describes every option; see also docs/configuration.md.

[cache]
# Vectors are rounded to this type before they are returned or stored: "float32", "float16" or "int8".
dtype = "float32"

[key]
# Change the version to stop using all old vectors. Then remove the old vectors with `embedonce purge --version v1`.
version = "v1"
# Steps that normalise a text before it is embedded. Other steps: "nfkc", "collapse-whitespace", "casefold",
# "newlines", "surrogates". With an empty list, texts are embedded as they are.
normalize = ["nfc", "strip"]
# A namespace separates projects or tenants that share a store.
# namespace = "my-project"
# Secret for a keyed digest. Only someone who knows the secret can guess short texts from the stored keys.
# secret = "${EMBEDONCE_SECRET}"

"""

_TIERS_HEAD = """\
# A lookup reads the tiers in the order of this file, so list the fastest tier first. A vector that is found in a
# slower tier is copied to the faster tiers.
"""

_LEASE = """\
# If several processes need the vector of the same new text, only one process embeds the text, and the others wait.
# If that process dies, another one takes over after this long. "off": every process embeds the text.
# lease = "2.5s"
"""

PROVIDERS: Mapping[str, Section] = {
    "ngram": Section(
        """\
# The provider makes the vectors. This provider runs locally and needs no model. A search with its vectors finds texts
# that are spelled alike, not texts that mean the same. To search by meaning, use a model: see `embedonce init --help`.
""",
        """\
[provider]
type = "ngram"
dimensions = 256
""",
    ),
    "sentence-transformers": Section(
        """\
# The provider makes the vectors. This provider runs a model of the sentence-transformers library in this process.
""",
        """\
[provider]
type = "sentence-transformers"
# A model on the Hugging Face hub, or a folder. The first run downloads the model if it is on the hub.
model = "sentence-transformers/all-MiniLM-L6-v2"
# Branch, tag or commit on the hub.
# revision = "main"
# "cpu", "cuda", "cuda:1" or "mps". Default: the fastest device that is available.
# device = "cpu"
# Scale each vector to unit length. Many models do this themselves.
# normalize_embeddings = true
# Refuse a text that is too long. By default, the library cuts such a text.
# truncate = "error"
""",
        extra="sentence-transformers",
    ),
    "openai": Section(
        """\
# The provider makes the vectors. This provider calls OpenAI, or any endpoint with the same API, such as Ollama, vLLM or
# TEI. For Azure, see docs/providers.md.
""",
        """\
[provider]
type = "openai"
model = "text-embedding-3-small"
# The key is read from the environment. Never write it into this file. For an endpoint without keys, remove this line.
api_key = "${OPENAI_API_KEY}"
# Request vectors with fewer dimensions, if the model supports this.
# dimensions = 512
# The URL of a different endpoint, up to and including /v1.
# base_url = "http://localhost:11434/v1"
# Set this for an endpoint that silently cuts texts that are too long, as Ollama does. OpenAI refuses such texts.
# truncate = "provider"
# The price of the tokens. With it, `embedonce embed --dry-run` and the statistics show money.
# price = "0.02 USD / 1M tokens"
""",
        extra="openai",
        variables=("OPENAI_API_KEY",),
    ),
    "gemini": Section(
        """\
# The provider makes the vectors. This provider calls Google's Gemini API.
""",
        """\
[provider]
type = "gemini"
model = "gemini-embedding-001"
# The key is read from the environment. Never write it into this file.
api_key = "${GEMINI_API_KEY}"
# The model's vectors have 3072 dimensions by default. Vectors with fewer dimensions do not have unit length;
# with normalize = true, they are scaled to unit length.
dimensions = 768
normalize = true
# The price of the tokens. With it, `embedonce embed --dry-run` and the statistics show money.
# price = "0.02 USD / 1M tokens"
""",
        extra="gemini",
        variables=("GEMINI_API_KEY",),
    ),
}

TIERS: Mapping[str, Section] = {
    "memory": Section(
        """\
# Memory of this process.
""",
        """\
[[tiers]]
type = "memory"
max_entries = 2048
# max_bytes = "64 MiB"
# Erasing a text does not reach the memory of other processes; a ttl limits how long these processes keep the vector.
# ttl = "10m"
""",
    ),
    "disk": Section(
        """\
# A folder on the local disk, shared by the processes of this host. A relative path starts at the folder of this file.
""",
        """\
[[tiers]]
type = "disk"
path = ".embedonce"
max_bytes = "2 GiB"
# Without a ttl, entries stay until their space is needed.
# ttl = "30d"
""",
    ),
    "memcached": Section(
        """\
# memcached, shared by several hosts. It loses all entries when it restarts. It has no password and no TLS, so keep it
# on a private network.
""",
        """\
[[tiers]]
type = "memcached"
# List every node as host:port. All programs that share the nodes must spell each host name in the same way, because the
# spelling determines which node stores a key.
servers = ["localhost:11211"]
prefix = "embedonce:"
# `embedonce purge` cannot list keys in memcached; a ttl limits how long an entry stays.
ttl = "7d"
# Encrypt the entries. Requires: pip install 'embedonce[encryption]'. Make a key with: openssl rand -base64 32
# encryption = "${EMBEDONCE_KEY}"
""",
        extra="memcached",
    ),
    "redis": Section(
        """\
# Redis or Valkey, shared by several hosts. Set maxmemory and an eviction policy such as volatile-lru on the server.
""",
        """\
[[tiers]]
type = "redis"
# The URL may contain a password, so set it in the environment. Use rediss:// for TLS; for clusters, see docs/redis.md.
url = "${REDIS_URL:-redis://localhost:6379/0}"
prefix = "embedonce:"
ttl = "30d"
"""
        + _LEASE,
        extra="redis",
    ),
    "postgres": Section(
        """\
# A table in Postgres, shared by several hosts. The vectors are stored with pgvector if it is installed.
""",
        """\
[[tiers]]
type = "postgres"
# The URL may contain a password, so set it in the environment: postgresql://user@host:5432/database
url = "${DATABASE_URL}"
table = "embedonce"
# Set this if the database role of your programs is not allowed to create tables. Then run `embedonce migrate` once,
# with a role that is allowed to create tables.
# create = false
# Without a ttl, rows are kept until you purge them.
# ttl = "90d"
"""
        + _LEASE,
        extra="postgres",
        variables=("DATABASE_URL",),
    ),
}
"""Tiers from the fastest to the slowest: this process, this host, the network. On the network, the stores that keep
entries in memory come before the database."""


SERVE = Section(
    """\
# `embedonce serve` serves the provider and the tiers to programs in any language, as OpenAI's embeddings endpoint.
""",
    """\
[serve]
# To accept connections from other machines, set "0.0.0.0". This requires tenants and allowed_hosts.
host = "127.0.0.1"
port = 8080
# Names and addresses, without a port, in the URLs of clients on other machines.
# allowed_hosts = ["embeddings.internal"]
# Key for the paths below /admin and, if there are tenants, for /metrics. Without it, these paths do not exist.
# admin_key = "${EMBEDONCE_ADMIN_KEY}"
# Folder for the counts of the tenants' limits. In a container, use a volume. Default: in the user's state folder.
# state_dir = "/var/lib/embedonce"
# The server offers the model of [provider]. To offer several models, write a [[serve.models]] for each of them.
# A tenant is a caller of the server, with its own vectors and limits. Without tenants, requests need no key. A key has
# at least 16 characters. It is read from the environment. Never write it into this file.
# [[serve.tenants]]
# name = "search"
# keys = ["${SEARCH_TEAM_KEY}"]
# requests_per_minute = 600
# tokens_per_day = 5_000_000
""",
    extra="serve",
)


def render_file(provider: str, tiers: Sequence[str]) -> str:
    """Return the whole file for a provider and some tiers; the tiers keep their order."""
    sections = [*(TIERS[tier].render() for tier in tiers), SERVE.render()]
    return f"{_HEAD}{PROVIDERS[provider].render()}\n{_TIERS_HEAD}\n" + "\n".join(sections)
