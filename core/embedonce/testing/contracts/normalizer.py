"""Standard tests of every normalisation step: subclass :class:`NormalizerContract` and run pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce.contracts import Normalizer

from .support import Recipe, run_in_processes, run_in_threads
from .whole import Contract, register_standard_tests

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
# A step may cut a long text after a fixed number of UTF-16 units. Each emoji has two units, so the cut splits an emoji
# in the first text if the number is odd, and in the second text if the number is even.
HALVES = ("\U0001f9ea" * 100, "a" + "\U0001f9ea" * 100)
ODD = (
    *("", " ", "\n", "\0", "a\0b", "\u200b", "\ufeff", "\U0010ffff", "e\u0301" * 50, "\u202eright to left", "\u0345"),
    *HALVES,
)
LONG = 2**20


class NormalizerContract(Contract):
    """Subclass this class as ``Test…`` and write :meth:`make`; pytest does the rest."""

    texts: ClassVar[Sequence[str]] = TEXTS
    """Texts whose normalised forms must all differ."""
    same: ClassVar[Sequence[tuple[str, str]]] = ()
    """Pairs of texts. The step must return the same form for both texts of a pair."""
    examples: ClassVar[int | None] = None
    """Number of examples that hypothesis tries; None means the number in hypothesis's profile."""

    def make(self) -> Normalizer:
        """Return the step that the plugin registers."""
        raise NotImplementedError(f"{type(self).__name__} must define which step to test: def make(self) -> Normalizer")

    def recipe(self) -> Recipe | None:
        """Return ``Recipe(step)`` if another process can import the step, else None."""
        return None

    def test_a_form_is_text(self) -> None:
        for text in self.texts:
            form = self.make()(text)
            assert type(form) is str, f"a step must return a str, got {type(form).__name__}"

    def test_a_text_has_one_form(self) -> None:
        step = self.make()
        forms = [step(text) for text in self.texts]
        assert [step(text) for text in self.texts] == forms, "the step returned a different form for the same text"
        backwards = [step(text) for text in reversed(self.texts)]
        assert backwards[::-1] == forms, "the form of a text must not depend on the texts before it"

    def test_a_form_is_its_own_form(self) -> None:
        # A caller may store normalised texts and embed them later. A normalised text must then have the same key as the
        # original text.
        step = self.make()
        for text in (*self.texts, *ODD):
            assert step(step(text)) == step(text), f"the form of {text[:40]!a} changes when it is normalised again"

    def test_an_empty_text_has_a_form(self) -> None:
        self._normalize("")

    def test_any_unicode_has_a_form(self) -> None:
        for text in ODD:
            self._normalize(text)

        @self._make_settings()
        @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
        def check(text: str) -> None:
            form = self._normalize(text)
            assert self._normalize(form) == form, "a form changes when it is normalised again"

        check()

    def test_a_long_text_keeps_its_end(self) -> None:
        words = "the quick brown fox jumps over the lazy dog "
        text = (words * (LONG // len(words) + 1))[:LONG]
        one, two = self._normalize(f"{text} one"), self._normalize(f"{text} two")
        assert one != two, "two long texts that differ only in their last word have the same form"

    def test_texts_that_differ_stay_apart(self) -> None:
        step = self.make()
        first: dict[str, int] = {}
        for place, text in enumerate(self.texts):
            form = step(text)
            assert form not in first, (
                f"texts[{first[form]}] and texts[{place}] have the same form, but must have different forms"
            )
            first[form] = place

    def test_spellings_of_one_text_meet(self) -> None:
        if not self.same:
            pytest.skip("requires `same`, pairs of texts that have the same form")
        step = self.make()
        for place, (one, other) in enumerate(self.same):
            assert step(one) == step(other), f"the two texts of same[{place}] have different forms"

    def test_threads_get_their_own_forms(self) -> None:
        step = self.make()
        expected = [step(text) for text in self.texts]

        def work(number: int) -> None:
            for turn in range(200):
                place = (number + turn) % len(expected)
                assert step(self.texts[place]) == expected[place], "a thread got the form of another text"

        run_in_threads(8, work, "the step, called from eight threads,")

    def test_another_process_gives_the_same_form(self) -> None:
        recipe = self.recipe()
        if recipe is None:
            pytest.skip("requires recipe(), with which another process can import the step")
        step = self.make()
        for seed in ("1", "2"):
            (answer,) = run_in_processes([{"forms": list(self.texts)}], recipe, PYTHONHASHSEED=seed)
            assert answer == [step(text) for text in self.texts], "another process returned a different form for a text"

    # --- helpers ------------------------------------------------------------------------------

    def _normalize(self, text: str) -> str:
        """Return the normalised form of ``text``. The form must be a str that can be encoded as UTF-8."""
        what = ascii(text[:40])
        try:
            form = self.make()(text)
        except Exception as error:
            raise AssertionError(f"the step raised {type(error).__name__} for {what}") from error
        assert type(form) is str, f"the form of {what} must be a str, got {type(form).__name__}"
        try:
            form.encode()
        except UnicodeEncodeError:
            raise AssertionError(f"the form of {what} contains a lone surrogate, which cannot be encoded") from None
        return form

    def _make_settings(self) -> settings:
        chosen = settings(deadline=None, database=None)
        return chosen if self.examples is None else settings(chosen, max_examples=self.examples)


register_standard_tests(NormalizerContract)
