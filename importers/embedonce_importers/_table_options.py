"""The options that the importers of your own tables share: their columns, and which options go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from embedonce.errors import ConfigError
from embedonce.options import Doc

from ._key_templates import KeyTemplate, Step

DEFAULT_KEY = 'sha256("{text}")'

OTHER_TEXT = "the text of the row does not have the key of the row, so it is not the whole text"

KeyColumnOption: TypeAlias = Annotated[str | None, Doc("Column with the keys that are made from the texts.")]
TextColumnOption: TypeAlias = Annotated[
    str | None,
    Doc(
        "Column with the whole text that was embedded, not a preview of it. With it, all of the table can be read, and "
        "key_column is not needed."
    ),
]
ModelColumnOption: TypeAlias = Annotated[
    str | None,
    Doc("Column with the name of the model, if the table has vectors of several. Rows of model are read."),
]


def make_template(
    key: str,
    *,
    key_column: str | None,
    text_column: str | None,
    model_column: str | None,
    model: str | None,
    steps: Sequence[Step],
) -> KeyTemplate | None:
    """Return how a table makes its keys, or None if its texts are its keys.

    Raises:
        ConfigError: an option is missing, or one of them has no effect.
    """
    if key_column is None and text_column is None:
        raise ConfigError("set key_column to the column with the keys, or text_column to the column with the texts")
    if model_column is not None and model is None:
        raise ConfigError("model_column needs the option model, the name of the model in that column")
    if key_column is None and (steps or key != DEFAULT_KEY):
        raise ConfigError("key and steps are for keys: set key_column, or remove them")
    if key_column is None and model is not None and model_column is None:
        raise ConfigError("model is for keys and for model_column: set one of the columns, or remove model")
    if key_column is None:
        return None
    # With model_column, the keys need not contain the model.
    return KeyTemplate(key, model=model if model_column is None or "{model}" in key else None, steps=steps)
