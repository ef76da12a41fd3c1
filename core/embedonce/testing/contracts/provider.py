"""What every provider must do, as tests: subclass :class:`ProviderContract` and run pytest.

It works for a provider with ``embed``, with ``aembed``, and with both, which then must agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from embedonce.contracts import AnyProvider, Embedded, Limits
from embedonce.errors import TextRefused
from embedonce.keys import VectorSpace

from .support import BOUND, Recipe, in_processes, in_threads
from .whole import Whole, standard

TEXTS = (
    "A cache keeps what was computed once.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "富士山は日本で一番高い山です。",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "🧪 emoji, a family 👨‍👩‍👧 and a flag 🇨🇭",
    "two\nlines\tand a tab",
    "  white space around  ",
    "SELECT vector FROM entries WHERE key = ANY(%s);",
)

MIB = 2**20


class ProviderContract(Whole):
    """Subclass it as ``Test…``, write :meth:`make`, and pytest does the rest."""

    tolerance: ClassVar[float] = 0.0
    """How far a value of the same text's vector may be off when computed again: 0.0 is bit by bit. Models
    on a processor differ by about 1e-6 between batches."""
    tasks: ClassVar[Sequence[str]] = ("document", "query")
    texts: ClassVar[Sequence[str]] = TEXTS
    """At least four, all different, that the provider takes."""
    most: ClassVar[int] = 256
    """Most texts that are sent in one call, where ``limits.max_batch`` allows more."""

    def make(self) -> AnyProvider:
        """Return a new provider; every one that this returns has the same options. It is closed by who asked for it."""
        raise NotImplementedError(f"{type(self).__name__} says how its provider is made: def make(self) -> Provider")

    def recipe(self) -> Recipe | None:
        """Return how another process makes the same provider."""
        return None

    # --- what it says of itself ---------------------------------------------------------------

    def test_limits_make_sense(self) -> None:
        with self._open() as opened:
            limits = opened.provider.limits
            assert isinstance(limits, Limits), "limits is a Limits(...)"
            assert limits.max_batch >= 1, "max_batch is at least 1"
            assert limits.concurrency >= 1, "concurrency is at least 1"
            assert limits.timeout is None or limits.timeout > 0, "timeout is None or above 0"
            assert limits.max_tokens is None or limits.max_tokens >= 1, "max_tokens is None or at least 1"
            if limits.max_tokens is not None:
                counts = callable(getattr(opened.provider, "count_tokens", None))
                assert counts, "max_tokens is declared, and there is no method count_tokens"
            assert opened.provider.limits == limits, "limits do not change"

    def test_the_space_is_described_and_stays(self) -> None:
        with self._open() as opened:
            for task in self.tasks:
                space = opened.provider.space(task)
                assert isinstance(space, VectorSpace), "space(task) is a VectorSpace(...)"
                before = space.fingerprint()
                opened.embed(self.texts[:2], task)
                again = opened.provider.space(task).fingerprint()
                assert again == before, f"the space of task {task!r} is described otherwise after a call"

    def test_two_instances_describe_one_space(self) -> None:
        with self._open() as one, self._open() as two:
            for task in self.tasks:
                first, second = (opened.provider.space(task).fingerprint() for opened in (one, two))
                assert first == second, f"two instances with the same options describe two spaces for task {task!r}"
                self._near(one.embed(self.texts, task), two.embed(self.texts, task), "another instance's vectors")

    def test_the_dimensions_are_as_described(self) -> None:
        with self._open() as opened:
            for task in self.tasks:
                described = opened.provider.space(task).dimensions
                width = opened.embed(self.texts[:1], task).shape[1]
                assert described in (None, width), f"space({task!r}) says {described} dimensions, vectors have {width}"

    def test_tasks_that_differ_have_different_spaces(self) -> None:
        with self._open() as opened:
            first, *others = self.tasks
            for task in others:
                spaces = [opened.provider.space(name).fingerprint() for name in (first, task)]
                if spaces[0] != spaces[1]:
                    continue
                self._near(
                    opened.embed(self.texts, first),
                    opened.embed(self.texts, task),
                    f"tasks {first!r} and {task!r} share a space, so their vectors are the same; the vectors",
                )

    # --- what it returns ----------------------------------------------------------------------

    def test_one_vector_per_text(self) -> None:
        with self._open() as opened:
            largest = min(self.most, opened.provider.limits.max_batch)
            for count in sorted({1, min(2, largest), largest}):
                texts = [f"{self.texts[number % len(self.texts)]} {number}" for number in range(count)]
                vectors = opened.embed(texts)
                assert len(vectors) == count, f"{len(vectors)} vectors for {count} texts"

    def test_vectors_are_finite_floats(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            assert np.isfinite(vectors).all(), "a vector holds NaN or infinity"
            assert vectors.any(axis=1).all(), "a vector is all zero"
            assert vectors.shape[1] > 0, "vectors have no values"

    def test_every_text_has_its_own_vector(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            assert len({row.tobytes() for row in vectors}) == len(self.texts), "different texts have the same vector"

    def test_order_is_kept(self) -> None:
        with self._open() as opened:
            texts = list(self.texts)
            vectors = opened.embed(texts)
            self._near(opened.embed(texts[::-1])[::-1], vectors, "the same texts' vectors, asked in reverse,")

    def test_alone_as_in_a_batch(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            for text, vector in zip(self.texts, vectors, strict=True):
                self._near(opened.embed([text])[0], vector, "a text's vector, asked alone,")

    def test_batches_that_are_almost_alike_differ(self) -> None:
        with self._open() as opened:
            *batch, other = self.texts[:4]
            vectors = opened.embed([*batch, other])
            opened.embed(batch)
            for place in range(len(batch)):
                order = [len(batch) if number == place else number for number in range(len(batch))]
                found = opened.embed([self.texts[number] for number in order])
                self._near(found, vectors[order], f"after a batch with another text at {place}, vectors")

    def test_a_text_twice_has_one_vector(self) -> None:
        with self._open() as opened:
            first, second = self.texts[:2]
            vectors = opened.embed([first, second, first])
            assert len(vectors) == 3, "a text that comes twice has two rows"
            self._near(vectors[2], vectors[0], "the same text's second vector in one call")
            self._near(opened.embed([second])[0], vectors[1], "the vector between two equal texts")

    def test_a_later_call_leaves_earlier_vectors_alone(self) -> None:
        with self._open() as opened:
            given = opened.answer(self.texts[:3])
            before = np.array(_vectors(given))
            opened.answer(self.texts[1:4])
            assert np.array_equal(before, np.array(_vectors(given))), "a call changes what an earlier one returned"

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open() as opened:
            texts = list(self.texts)
            opened.embed(texts)
            assert texts == list(self.texts), "the list of texts that was handed in was changed"
            self._near(opened.embed(tuple(texts)), opened.embed(texts), "vectors of a tuple of texts")

    def test_tokens_are_a_number_or_none(self) -> None:
        with self._open() as opened:
            answer = opened.answer(self.texts[:2])
            if isinstance(answer, Embedded):
                assert answer.tokens is None or (isinstance(answer.tokens, int) and answer.tokens >= 0)

    def test_sync_and_async_agree(self) -> None:
        with self._open() as opened:
            if not (hasattr(opened.provider, "embed") and hasattr(opened.provider, "aembed")):
                pytest.skip("it has one face alone")
            self._near(opened.embed(self.texts, asynchronous=True), opened.embed(self.texts), "vectors of aembed")

    # --- what it refuses ----------------------------------------------------------------------

    def test_an_empty_text_is_embedded_or_refused(self) -> None:
        self._embedded_or_refused("", "an empty text", full=True)

    def test_a_long_text_is_embedded_or_refused(self) -> None:
        words = "The quick brown fox jumps over the lazy dog. "
        self._embedded_or_refused((words * (MIB // len(words) + 1))[:MIB], "a text of 1 MiB")

    def test_any_unicode_is_embedded_or_refused(self) -> None:
        for text in ("\0", "a\0b", "\u200b", "\ufeff", "\U0010ffff", "e\u0301" * 50, " ", "\u202eright to left"):
            self._embedded_or_refused(text, ascii(text))

    # --- threads, processes, the end ----------------------------------------------------------

    def test_threads_get_their_own_vectors(self) -> None:
        with self._open() as opened:
            if not hasattr(opened.provider, "embed"):
                pytest.skip("it has aembed alone, and runs in one loop")
            expected = opened.embed(self.texts)

            def work(number: int) -> None:
                for turn in range(3):
                    place = (number + turn) % len(self.texts)
                    vector = opened.embed([self.texts[place]])[0]
                    self._near(vector, expected[place], "a vector from one of eight threads")

            in_threads(8, work, "embed from eight threads")

    def test_tasks_of_a_loop_get_their_own_vectors(self) -> None:
        with self._open() as opened:
            if not hasattr(opened.provider, "aembed"):
                pytest.skip("it has embed alone")
            expected = opened.embed(self.texts, asynchronous=True)

            async def all_at_once() -> list[Any]:
                return await asyncio.gather(*(opened.provider.aembed([text], self.tasks[0]) for text in self.texts))

            for place, answer in enumerate(opened.run(all_at_once())):
                self._near(_array(answer, 1)[0], expected[place], "a vector from one of several tasks")

    def test_another_process_makes_the_same_vectors(self) -> None:
        recipe = self.recipe()
        if recipe is None:
            pytest.skip("needs recipe(): how another process makes the same provider")
        request = {"texts": list(self.texts), "tasks": list(self.tasks)}
        with self._open() as opened:
            for seed in ("1", "2"):
                (answer,) = in_processes([request], recipe, PYTHONHASHSEED=seed)
                for task in self.tasks:
                    fingerprint = opened.provider.space(task).fingerprint().hex()
                    assert answer[task]["fingerprint"] == fingerprint, "another process describes another space"
                    there = np.array(answer[task]["vectors"], np.float32)
                    self._near(there, opened.embed(self.texts, task), "another process's vectors")

    def test_close_twice_does_nothing(self) -> None:
        with self._open() as opened:
            opened.embed(self.texts[:1])
            opened.provider.close()
            opened.provider.close()

    # --- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[_Opened]:
        provider = self.make()
        try:
            # One loop for one provider: an async client belongs to the loop that it was first used in.
            with asyncio.Runner() as runner:
                yield _Opened(provider, runner, self.tasks[0])
        finally:
            provider.close()

    def _near(self, found: NDArray[Any], expected: NDArray[Any], what: str) -> None:
        assert found.shape == expected.shape, f"{what} have shape {found.shape}, not {expected.shape}"
        if self.tolerance == 0.0:
            assert np.array_equal(found, expected), f"{what} differ, and tolerance is 0.0"
            return
        off = float(np.max(np.abs(found - expected)))
        assert off <= self.tolerance, f"{what} differ by up to {off:.2g}, and tolerance is {self.tolerance:g}"

    def _embedded_or_refused(self, text: str, what: str, *, full: bool = False) -> None:
        """Require a good vector, or TextRefused that names the text and leaves its neighbours to be asked again.

        ``full``: also as the last of a full batch.
        """
        with self._open() as opened:
            good = self.texts[0]
            self._answers_or_refuses(opened, [text], 0, what)
            if opened.provider.limits.max_batch >= 3:
                self._answers_or_refuses(opened, [good, text, good], 1, what)
            if full and (largest := min(self.most, opened.provider.limits.max_batch)) > 3:
                # What a service takes at once may be less: the position is that in the whole batch.
                self._answers_or_refuses(opened, [good] * (largest - 1) + [text], largest - 1, what)

    def _answers_or_refuses(self, opened: _Opened, texts: list[str], place: int, what: str) -> None:
        refused: TextRefused | None = None
        vectors = np.ones((1, 1))
        try:
            vectors = opened.embed(texts)
        except TextRefused as error:
            refused = error
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{what} raises {type(error).__name__}; raise TextRefused instead") from error
        positions = refused.positions if refused is not None else ()
        assert positions in ((), (place,)), f"{what} is refused at position {place}, not at {positions}"
        assert np.isfinite(vectors).all(), f"{what} has a vector with NaN or infinity; raise TextRefused"
        assert vectors.any(axis=1).all(), f"{what} has a vector that is all zero; raise TextRefused"


class _Opened:
    """A provider with the loop that it runs in."""

    def __init__(self, provider: Any, runner: asyncio.Runner, task: str) -> None:
        self.provider = provider
        self._runner = runner
        self._task = task

    def answer(self, texts: Sequence[str], task: str | None = None, *, asynchronous: bool = False) -> Any:
        """Return what the provider returns."""
        task = self._task if task is None else task
        if asynchronous or not hasattr(self.provider, "embed"):
            return self.run(self.provider.aembed(texts, task))
        return self.provider.embed(texts, task)

    def embed(self, texts: Sequence[str], task: str | None = None, *, asynchronous: bool = False) -> NDArray[Any]:
        """Return the vectors, shape (n, d), their form checked."""
        return _array(self.answer(texts, task, asynchronous=asynchronous), len(texts))

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the provider's loop."""

        async def in_time() -> Any:
            async with asyncio.timeout(BOUND):
                return await coroutine

        return self._runner.run(in_time())


def _vectors(answer: Any) -> Any:
    return answer.vectors if isinstance(answer, Embedded) else answer


def _array(answer: Any, count: int) -> NDArray[Any]:
    vectors = np.asarray(_vectors(answer))
    assert vectors.ndim == 2, f"vectors have shape (n, d), not {vectors.shape}"
    assert np.issubdtype(vectors.dtype, np.floating), f"vectors are floats, not {vectors.dtype}"
    assert len(vectors) == count, f"{len(vectors)} vectors for {count} texts"
    return vectors


standard(ProviderContract)
