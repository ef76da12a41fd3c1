"""What every normalisation step must do, as tests: subclass :class:`NormalizerContract` and run pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce.contracts import Normalizer

from .support import Recipe, in_processes, in_threads
from .whole import Whole, standard

TEXTS = (
    "A cache keeps what was computed once.",
    "A cache keeps what was computed twice.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "富士山は日本で一番高い山です。",
    "京都は日本の古い都です。",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "🧪 emoji, a family 👨‍👩‍👧 and a flag 🇨🇭",
    "a tab\tand  two spaces\r\nand a line",
    "3.14 and 2.71",
)
# UTF-16 that is cut at any place is cut in the middle of a character in one of these.
HALVES = ("\U0001f9ea" * 100, "a" + "\U0001f9ea" * 100)
ODD = (
    *("", " ", "\n", "\0", "a\0b", "\u200b", "\ufeff", "\U0010ffff", "e\u0301" * 50, "\u202eright to left", "\u0345"),
    *HALVES,
)
LONG = 2**20


class NormalizerContract(Whole):
    """Subclass it as ``Test…``, write :meth:`make`, and pytest does the rest."""

    texts: ClassVar[Sequence[str]] = TEXTS
    """Texts of which no two have one form."""
    same: ClassVar[Sequence[tuple[str, str]]] = ()
    """Pairs of texts that have one form: what the step is for."""
    examples: ClassVar[int | None] = None
    """How many examples hypothesis tries; None: as its profile says."""

    def make(self) -> Normalizer:
        """Return the step, as the plugin registers it."""
        raise NotImplementedError(f"{type(self).__name__} says which step it is: def make(self) -> Normalizer")

    def recipe(self) -> Recipe | None:
        """Return the step as ``Recipe(function)``, where another process can import it."""
        return None

    def test_a_form_is_text(self) -> None:
        for text in self.texts:
            form = self.make()(text)
            assert type(form) is str, f"a step returns text, not {type(form).__name__}"

    def test_a_text_has_one_form(self) -> None:
        step = self.make()
        forms = [step(text) for text in self.texts]
        assert [step(text) for text in self.texts] == forms, "a text has another form when it comes again"
        backwards = [step(text) for text in reversed(self.texts)]
        assert backwards[::-1] == forms, "a text's form depends on the texts before it"

    def test_a_form_is_its_own_form(self) -> None:
        # Whoever embeds what they read back from a store of normalised texts must hit.
        step = self.make()
        for text in (*self.texts, *ODD):
            assert step(step(text)) == step(text), f"the form of {text[:40]!a} has another form in turn"

    def test_an_empty_text_has_a_form(self) -> None:
        self._form("")

    def test_any_unicode_has_a_form(self) -> None:
        for text in ODD:
            self._form(text)

        @self._settings()
        @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
        def check(text: str) -> None:
            form = self._form(text)
            assert self._form(form) == form, "a form has another form in turn"

        check()

    def test_a_long_text_keeps_its_end(self) -> None:
        words = "the quick brown fox jumps over the lazy dog "
        text = (words * (LONG // len(words) + 1))[:LONG]
        assert self._form(f"{text} one") != self._form(f"{text} two"), "texts that differ at their end have one form"

    def test_texts_that_differ_stay_apart(self) -> None:
        step = self.make()
        first: dict[str, int] = {}
        for place, text in enumerate(self.texts):
            form = step(text)
            assert form not in first, f"texts {first[form]} and {place} of `texts` have one form, and so one vector"
            first[form] = place

    def test_spellings_of_one_text_meet(self) -> None:
        if not self.same:
            pytest.skip("needs `same`: pairs of texts that have one form")
        step = self.make()
        for place, (one, other) in enumerate(self.same):
            assert step(one) == step(other), f"pair {place} of `same` has two forms"

    def test_threads_get_their_own_forms(self) -> None:
        step = self.make()
        expected = [step(text) for text in self.texts]

        def work(number: int) -> None:
            for turn in range(200):
                place = (number + turn) % len(expected)
                assert step(self.texts[place]) == expected[place], "a thread gets another text's form"

        in_threads(8, work, "a step from eight threads")

    def test_another_process_gives_the_same_form(self) -> None:
        recipe = self.recipe()
        if recipe is None:
            pytest.skip("needs recipe(): the step where another process can import it")
        step = self.make()
        for seed in ("1", "2"):
            (answer,) = in_processes([{"forms": list(self.texts)}], recipe, PYTHONHASHSEED=seed)
            assert answer == [step(text) for text in self.texts], "another process gives a text another form"

    # --- helpers ------------------------------------------------------------------------------

    def _form(self, text: str) -> str:
        """Return the form, which must be text that can be encoded."""
        what = ascii(text[:40])
        try:
            form = self.make()(text)
        except Exception as error:
            raise AssertionError(f"the step raises {type(error).__name__} for {what}") from error
        assert type(form) is str, f"the form of {what} is no text: {type(form).__name__}"
        try:
            form.encode()
        except UnicodeEncodeError:
            raise AssertionError(f"the form of {what} holds a lone surrogate, which nothing can encode") from None
        return form

    def _settings(self) -> settings:
        chosen = settings(deadline=None, database=None)
        return chosen if self.examples is None else settings(chosen, max_examples=self.examples)


standard(NormalizerContract)
