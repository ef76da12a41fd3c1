"""Every text that `embedonce embed` may have embedded from some files, however they were split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .embedding.formats import Format
from .embedding.texts import Split
from .output import say

if TYPE_CHECKING:
    from .embedding.sources import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Files and folders with texts, and how they are read."""

    paths: Sequence[str]
    field: str | None
    fields: Mapping[str, str] | None
    format: Format
    delimiter: str | None
    quote: str | None
    encoding: str | None
    leave_out: Collection[str] = ()

    def read_texts(self) -> tuple[list[str], int]:
        """Return the distinct texts, and the number of records and files that cannot be read, which are reported.

        The texts are the passages of any ``--split``, and the whole content of each file, with and without a line end.
        """
        from .embedding.passages import Passage

        texts: dict[str, None] = {}
        broken = 0
        for item in self._read("paragraph"):
            if isinstance(item, Passage):
                texts[item.text] = None
            else:
                broken += 1
                say(str(item))
        # What is broken here is broken above as well, or is not a passage for any option of embed.
        texts |= dict.fromkeys(item.text for item in self._read("line") if isinstance(item, Passage))
        for item in self._read_whole():
            if isinstance(item, Passage):
                texts |= dict.fromkeys(add_without_line_end(item.text))
        return list(texts), broken

    def _read(self, split: Split) -> Reader:
        """Return the passages as `embedonce embed` reads them."""
        from .embedding.sources import Reader

        return Reader(
            self.paths,
            split=split,
            field=self.field,
            fields=self.fields,
            format=self.format,
            delimiter=self.delimiter,
            quote=self.quote,
            encoding=self.encoding,
            leave_out=self.leave_out,
        )

    def _read_whole(self) -> Reader:
        """Return the whole content of each file as one passage, even if the file has records."""
        from .embedding.sources import Reader

        return Reader(self.paths, split="file", format="text", encoding=self.encoding, leave_out=self.leave_out)


def add_without_line_end(text: str) -> list[str]:
    """Return a text, and the text without its line end if it has one."""
    return list(dict.fromkeys((text, text.removesuffix("\n").removesuffix("\r"))))
