"""A normalisation step that removes accents: é becomes e."""

import unicodedata
from collections.abc import Callable, Mapping

from embedonce import hookimpl


def remove_accents(text: str) -> str:
    parts = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(part for part in parts if not unicodedata.combining(part)))


@hookimpl
def embedonce_normalizers() -> Mapping[str, Callable[[str], str]]:
    return {"unaccented": remove_accents}
