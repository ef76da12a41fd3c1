"""Count tokens with the tokenizer of a sentence-transformers model, without loading the model.

Only the tokenizer's own file is read, with the library ``tokenizers``, on which sentence-transformers depends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from embedonce.errors import SpaceError

from ._model_folder import MODULES, TRANSFORMER, get_library_class, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names under which the library keeps the settings of the first module. It reads the first file that exists."""
KNOWN_SETTINGS: Final = frozenset(
    ("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs")
)
"""Settings whose effect on the tokens is known. With any other setting, tokens are not counted."""


class TokenCounter:
    """Counts the tokens that a model reads: with special tokens, and up to the model's maximum."""

    def __init__(self, tokenizer: Tokenizer, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length

    def count(self, texts: Sequence[str]) -> list[int]:
        # One text after the other, because encoding a batch starts threads, which a forked child would miss.
        numbers = [len(self._tokenizer.encode(text)) for text in texts]
        return numbers if self._max_length is None else [min(number, self._max_length) for number in numbers]


def load_token_counter(folder: Path, max_length: int | None) -> TokenCounter | None:
    """Return a counter for the model in a folder, or None if its tokenizer is missing or has an unknown setting.

    ``max_length`` replaces the model's own maximum.
    """
    try:
        module = _find_first_module(folder)
        settings = {} if module is None else _read_settings(module)
        if module is None or not (module / TOKENIZER).is_file() or not _are_known(settings):
            return None
        return TokenCounter(_load_tokenizer(module, settings), max_length or _find_max_length(module, settings))
    except SpaceError:
        return None


def _find_first_module(folder: Path) -> Path | None:
    """Return the folder of the model's first module if this is a transformer, else None."""
    modules = read_json(folder, MODULES, list)
    if modules is None:
        return folder
    if not modules or get_library_class(modules[0]) != "Transformer":
        return None
    return folder / str(modules[0].get("path", ""))


def _read_settings(module: Path) -> Mapping[str, Any]:
    found = (read_json(module, name, dict) for name in SETTINGS)
    return next((settings for settings in found if settings is not None), {})


def _are_known(settings: Mapping[str, Any]) -> bool:
    """Return whether the model reads only the tokens of the text. With a chat template, for example, it reads more."""
    used = {name for name, value in settings.items() if value}
    return used <= KNOWN_SETTINGS and "text" in (settings.get("modality_config") or ("text",))


def _load_tokenizer(module: Path, settings: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, normalizers

    try:
        tokenizer = Tokenizer.from_file(str(module / TOKENIZER))
    except Exception as error:
        raise SpaceError(f"cannot read the model's {module / TOKENIZER}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if settings.get("do_lower_case"):
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _find_max_length(module: Path, settings: Mapping[str, Any]) -> int | None:
    """Return the model's maximum number of tokens, which the library chooses in the same way; None if it has none."""
    if settings.get("max_seq_length") is not None:
        return int(settings["max_seq_length"])
    tokenizer = read_json(module, "tokenizer_config.json", dict) or {}
    transformer = read_json(module, TRANSFORMER, dict) or {}
    lengths = [tokenizer.get("model_max_length"), transformer.get("max_position_embeddings")]
    return min((int(length) for length in lengths if isinstance(length, int | float) and length > 0), default=None)
