"""A normalisation step: é is e."""

import unicodedata
from collections.abc import Callable, Mapping

from embedonce import hookimpl


def unaccented(text: str) -> str:
    parts = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(part for part in parts if not unicodedata.combining(part)))


@hookimpl
def embedonce_normalizers() -> Mapping[str, Callable[[str], str]]:
    return {"unaccented": unaccented}
