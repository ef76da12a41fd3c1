"""Count tokens with OpenAI's tokenizer, without a download.

The package ``tiktoken`` downloads the table of an encoding when it first needs it, and keeps it in a folder. This
module reads the table only from that folder.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import tiktoken

LOADER: Final = "load_tiktoken_bpe"
"""Name of the function with which tiktoken's constructors load a table."""


def count_tokens(model: str, texts: Sequence[str]) -> list[int] | None:
    """Return the number of tokens of each text, or None if the model's tokenizer is not on this machine.

    Names of special tokens in a text count as plain text, as OpenAI's endpoint for embeddings counts them.
    """
    encoding = _find_encoding(model)
    # One text after the other, because tiktoken's batches of short texts take longer.
    return None if encoding is None else [len(encoding.encode_ordinary(text)) for text in texts]


def _find_encoding(model: str) -> tiktoken.Encoding | None:
    """Return the encoding of one of OpenAI's models, or None if tiktoken or the encoding's table is missing."""
    if importlib.util.find_spec("tiktoken") is None:
        return None
    import tiktoken

    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:  # not a model of OpenAI's
        return None
    try:
        return _load_encoding(name)
    except (OSError, ValueError, LookupError):
        return None


@cache
def _load_encoding(name: str) -> tiktoken.Encoding:
    """Return an encoding whose table is on this machine.

    A failure is not cached, so a table that is downloaded later is found.

    Raises:
        OSError: the table is not on this machine.
        ValueError: the table is damaged.
        LookupError: this version of tiktoken loads the table in a way that this module does not know.
    """
    import tiktoken
    from tiktoken_ext import openai_public

    make: Any = openai_public.ENCODING_CONSTRUCTORS[name]
    if LOADER not in make.__code__.co_names:
        raise LookupError(name)
    # The constructor knows the pattern, the special tokens, and the address and the hash of the table. It would
    # download a missing table, so a copy of it gets another function in place of the one that loads tables.
    load: Callable[[], dict[str, Any]] = FunctionType(make.__code__, {**vars(openai_public), LOADER: _read_table})
    return tiktoken.Encoding(**load())


def _read_table(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
    """Return the table that tiktoken has downloaded from ``url``. The arguments are those of tiktoken's function.

    Raises:
        OSError: there is no such file.
        ValueError: the file does not have the expected hash.
    """
    content = (_find_folder() / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).read_bytes()
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise ValueError("the table of the encoding is damaged")
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _find_folder() -> Path:
    """Return the folder in which tiktoken keeps its tables.

    Raises:
        OSError: an empty variable says that tiktoken keeps no tables.
    """
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        folder = os.environ.get(name)
        if folder == "":
            raise FileNotFoundError(f"{name} is empty")
        if folder is not None:
            return Path(folder)
    return Path(tempfile.gettempdir(), "data-gym-cache")
