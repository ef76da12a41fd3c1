"""Standard tests of every provider: subclass :class:`ProviderContract` and run pytest.

A provider may have ``embed``, ``aembed`` or both. If a provider has both, both must return the same vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from embedonce._messages import format_count
from embedonce.contracts import AnyProvider, Embedded, Limits
from embedonce.errors import TextRefused
from embedonce.keys import VectorSpace

from .support import CALL_TIMEOUT, Recipe, run_in_processes, run_in_threads
from .whole import Contract, register_standard_tests

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


class ProviderContract(Contract):
    """Subclass this class as ``Test…`` and write :meth:`make`; pytest does the rest."""

    tolerance: ClassVar[float] = 0.0
    """Maximum difference, per value, between two vectors of the same text; 0.0 means that the vectors must be equal.
    With a model on a CPU, the values differ by about 1e-6 between batches."""
    tasks: ClassVar[Sequence[str]] = ("document", "query")
    texts: ClassVar[Sequence[str]] = TEXTS
    """At least four different texts that the provider accepts."""
    most: ClassVar[int] = 256
    """Maximum number of texts per call, even if ``limits.max_batch`` allows more."""

    def make(self) -> AnyProvider:
        """Return a new provider, always with the same options. The caller closes the provider."""
        raise NotImplementedError(
            f"{type(self).__name__} must define how to make a provider: def make(self) -> Provider"
        )

    def recipe(self) -> Recipe | None:
        """Return a recipe for the same provider in another process, or None if that is impossible."""
        return None

    # --- what the provider declares -----------------------------------------------------------

    def test_limits_make_sense(self) -> None:
        with self._open() as opened:
            limits = opened.provider.limits
            assert isinstance(limits, Limits), f"limits must be a Limits(...), got {type(limits).__name__}"
            assert limits.max_batch >= 1, f"limits.max_batch must be at least 1, got {limits.max_batch}"
            assert limits.concurrency >= 1, f"limits.concurrency must be at least 1, got {limits.concurrency}"
            timeout, max_tokens = limits.timeout, limits.max_tokens
            assert timeout is None or timeout > 0, f"limits.timeout must be None or above 0, got {timeout}"
            assert max_tokens is None or max_tokens >= 1, (
                f"limits.max_tokens must be None or at least 1, got {max_tokens}"
            )
            if max_tokens is not None:
                counts = callable(getattr(opened.provider, "count_tokens", None))
                assert counts, "limits.max_tokens requires a method count_tokens"
            for name in ("requests_per_minute", "tokens_per_minute"):
                rate = getattr(limits, name)
                assert rate is None or rate > 0, f"limits.{name} must be None or above 0, got {rate}"
            assert limits.max_retries >= 0, f"limits.max_retries must be at least 0, got {limits.max_retries}"
            assert opened.provider.limits == limits, "limits must not change"

    def test_the_space_is_described_and_stays(self) -> None:
        with self._open() as opened:
            for task in self.tasks:
                space = opened.provider.space(task)
                assert isinstance(space, VectorSpace), f"space() must return a VectorSpace, got {type(space).__name__}"
                before = space.fingerprint()
                opened.embed(self.texts[:2], task)
                again = opened.provider.space(task).fingerprint()
                assert again == before, f"space({task!r}) returned a different space after a call of embed or aembed"

    def test_two_instances_describe_one_space(self) -> None:
        with self._open() as one, self._open() as two:
            for task in self.tasks:
                first, second = (opened.provider.space(task).fingerprint() for opened in (one, two))
                assert first == second, f"two instances with the same options have different spaces for task {task!r}"
                self._require_near(
                    one.embed(self.texts, task), two.embed(self.texts, task), "the vectors from two instances"
                )

    def test_the_dimensions_are_as_described(self) -> None:
        with self._open() as opened:
            for task in self.tasks:
                described = opened.provider.space(task).dimensions
                width = opened.embed(self.texts[:1], task).shape[1]
                assert described in (None, width), (
                    f"space({task!r}) declares {described} dimensions, but vectors have {width}"
                )

    def test_tasks_that_differ_have_different_spaces(self) -> None:
        with self._open() as opened:
            first, *others = self.tasks
            for task in others:
                spaces = [opened.provider.space(name).fingerprint() for name in (first, task)]
                if spaces[0] != spaces[1]:
                    continue
                self._require_near(
                    opened.embed(self.texts, first),
                    opened.embed(self.texts, task),
                    f"tasks {first!r} and {task!r} share a space, so their vectors must be equal; the vectors",
                )

    def test_check_accepts_a_provider_that_can_be_called(self) -> None:
        with self._open() as opened:
            if not hasattr(opened.provider, "check"):
                pytest.skip('requires the optional method "check"')
            try:
                answer = opened.provider.check()
            except Exception as error:
                raise AssertionError(
                    f"check raised {type(error).__name__}, although the provider can be called"
                ) from error
            if asyncio.iscoroutine(answer):
                answer.close()
                raise AssertionError("check must be a blocking method; the engine never awaits a coroutine of check")
            assert answer is None, f"check must raise an error or return None, got {type(answer).__name__}"
            opened.embed(self.texts[:1])

    def test_prepare_can_be_called_again_and_changes_no_vector(self) -> None:
        with self._open() as one, self._open() as other:
            if not hasattr(one.provider, "prepare"):
                pytest.skip('requires the optional method "prepare"')
            for call in ("first", "second"):
                try:
                    answer = one.provider.prepare()
                except Exception as error:
                    raise AssertionError(f"the {call} call of prepare raised {type(error).__name__}") from error
                if asyncio.iscoroutine(answer):
                    answer.close()
                    raise AssertionError("prepare must be a blocking method; nobody awaits a coroutine of prepare")
            for task in self.tasks:
                first, second = (opened.provider.space(task).fingerprint() for opened in (one, other))
                assert first == second, f"space({task!r}) returned a different space after prepare"
                self._require_near(
                    one.embed(self.texts, task), other.embed(self.texts, task), "the vectors with and without prepare"
                )

    # --- what the provider returns ------------------------------------------------------------

    def test_one_vector_per_text(self) -> None:
        with self._open() as opened:
            largest = min(self.most, opened.provider.limits.max_batch)
            for count in sorted({1, min(2, largest), largest}):
                texts = [f"{self.texts[number % len(self.texts)]} {number}" for number in range(count)]
                vectors = opened.embed(texts)
                assert len(vectors) == count

    def test_vectors_are_finite_floats(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            assert np.isfinite(vectors).all(), "a vector contains NaN or infinity"
            assert vectors.any(axis=1).all(), "a vector has only zeros"
            assert vectors.shape[1] > 0, "vectors must have at least one dimension"

    def test_every_text_has_its_own_vector(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            distinct = len({row.tobytes() for row in vectors})
            assert distinct == len(self.texts), (
                f"{len(self.texts)} different texts have only {distinct} different vectors"
            )

    def test_order_is_kept(self) -> None:
        with self._open() as opened:
            texts = list(self.texts)
            vectors = opened.embed(texts)
            self._require_near(
                opened.embed(texts[::-1])[::-1], vectors, "the vectors of the same texts in reverse order"
            )

    def test_alone_as_in_a_batch(self) -> None:
        with self._open() as opened:
            vectors = opened.embed(self.texts)
            for text, vector in zip(self.texts, vectors, strict=True):
                self._require_near(
                    opened.embed([text])[0], vector, "the vectors of a text, first embedded in a batch and then alone,"
                )

    def test_batches_that_are_almost_alike_differ(self) -> None:
        with self._open() as opened:
            *batch, other = self.texts[:4]
            vectors = opened.embed([*batch, other])
            for place in range(len(batch)):
                opened.embed(batch)
                order = [len(batch) if number == place else number for number in range(len(batch))]
                found = opened.embed([self.texts[number] for number in order])
                self._require_near(
                    found,
                    vectors[order],
                    f"after a batch that has another text at position {place}, the vectors of the same texts",
                )

    def test_a_text_twice_has_one_vector(self) -> None:
        with self._open() as opened:
            first, second = self.texts[:2]
            vectors = opened.embed([first, second, first])
            assert len(vectors) == 3, "a text that occurs twice must have two rows"
            self._require_near(vectors[2], vectors[0], "the two vectors of a text that occurs twice in one call")
            self._require_near(
                opened.embed([second])[0],
                vectors[1],
                "the vectors of a text, first embedded between two copies of another text and then alone,",
            )

    def test_a_later_call_leaves_earlier_vectors_alone(self) -> None:
        with self._open() as opened:
            given = opened.answer(self.texts[:3])
            before = np.array(_get_vectors(given))
            opened.answer(self.texts[1:4])
            assert np.array_equal(before, np.array(_get_vectors(given))), (
                "a call changed the vectors of an earlier call"
            )

    def test_what_is_handed_in_is_left_alone(self) -> None:
        with self._open() as opened:
            texts = list(self.texts)
            opened.embed(texts)
            assert texts == list(self.texts), "the provider changed the list of texts that it was given"
            self._require_near(
                opened.embed(tuple(texts)), opened.embed(texts), "the vectors of a tuple and of a list of texts"
            )

    def test_tokens_are_numbers_or_none(self) -> None:
        with self._open() as opened:
            for count in (1, 2):
                answer = opened.answer(self.texts[:count])
                if isinstance(answer, Embedded):
                    _check_tokens(answer.tokens, count)

    def test_exact_counts_are_the_tokens_of_the_answer(self) -> None:
        with self._open() as opened:
            count = getattr(opened.provider, "count_exact_tokens", None)
            if count is None:
                pytest.skip('requires the optional method "count_exact_tokens"')
            for task in self.tasks:
                counted = count(list(self.texts), task)
                if counted is None:
                    pytest.skip("the provider cannot count tokens here, because its tokenizer is missing")
                _check_numbers(counted, len(self.texts), "count_exact_tokens")
                alone = [count([text], task)[0] for text in self.texts]
                assert list(counted) == alone, "count_exact_tokens must return the same numbers for each text alone"
                answer = opened.answer(self.texts[:3], task)
                if isinstance(answer, Embedded) and isinstance(answer.tokens, int):
                    total = sum(counted[:3])
                    assert answer.tokens == total, (
                        f"count_exact_tokens counts {total} tokens in a call, but Embedded.tokens is {answer.tokens}"
                    )

    def test_the_model_has_one_name(self) -> None:
        with self._open() as opened:
            answers = [opened.answer(texts) for texts in (self.texts[:1], self.texts[1:3])]
            names = {answer.model for answer in answers if isinstance(answer, Embedded)}
            assert all(name is None or (isinstance(name, str) and name) for name in names), (
                "Embedded.model must be None or the name of the model"
            )
            aliases = getattr(opened.provider, "answers_as", ())
            assert not isinstance(aliases, str), "answers_as must be a sequence of names, not one str"
            assert len(names.difference(aliases)) <= 1, (
                f"Embedded.model must be the same in every answer, or be in answers_as; got {sorted(map(str, names))}"
            )

    def test_sync_and_async_agree(self) -> None:
        with self._open() as opened:
            if not (hasattr(opened.provider, "embed") and hasattr(opened.provider, "aembed")):
                pytest.skip("requires both embed and aembed")
            self._require_near(
                opened.embed(self.texts, asynchronous=True),
                opened.embed(self.texts),
                "the vectors from aembed and from embed",
            )

    # --- what the provider refuses ------------------------------------------------------------

    def test_an_empty_text_is_embedded_or_refused(self) -> None:
        self._require_vector_or_refusal("", "an empty text", full=True)

    def test_a_long_text_is_embedded_or_refused(self) -> None:
        words = "The quick brown fox jumps over the lazy dog. "
        self._require_vector_or_refusal((words * (MIB // len(words) + 1))[:MIB], "a text of 1 MiB")

    def test_any_unicode_is_embedded_or_refused(self) -> None:
        for text in ("\0", "a\0b", "\u200b", "\ufeff", "\U0010ffff", "e\u0301" * 50, " ", "\u202eright to left"):
            self._require_vector_or_refusal(text, ascii(text))

    # --- threads, processes and close ---------------------------------------------------------

    def test_threads_get_their_own_vectors(self) -> None:
        with self._open() as opened:
            if not hasattr(opened.provider, "embed"):
                pytest.skip("requires embed")
            expected = opened.embed(self.texts)

            def work(number: int) -> None:
                for turn in range(3):
                    place = (number + turn) % len(self.texts)
                    vector = opened.embed([self.texts[place]])[0]
                    self._require_near(
                        vector,
                        expected[place],
                        "the vectors of a text, first embedded in a batch and then in one of 8 threads,",
                    )

            run_in_threads(8, work, "embed from eight threads")

    def test_tasks_of_a_loop_get_their_own_vectors(self) -> None:
        with self._open() as opened:
            if not hasattr(opened.provider, "aembed"):
                pytest.skip("requires aembed")
            expected = opened.embed(self.texts, asynchronous=True)

            async def embed_in_parallel() -> list[Any]:
                return await asyncio.gather(*(opened.provider.aembed([text], self.tasks[0]) for text in self.texts))

            for place, answer in enumerate(opened.run(embed_in_parallel())):
                vector = _check_array(answer, 1)[0]
                self._require_near(
                    vector,
                    expected[place],
                    "the vectors of a text, first embedded in a batch and then in one of several concurrent calls,",
                )

    def test_another_process_makes_the_same_vectors(self) -> None:
        recipe = self.recipe()
        if recipe is None:
            pytest.skip("requires recipe(), with which another process makes the same provider")
        request = {"texts": list(self.texts), "tasks": list(self.tasks)}
        with self._open() as opened:
            for seed in ("1", "2"):
                (answer,) = run_in_processes([request], recipe, PYTHONHASHSEED=seed)
                for task in self.tasks:
                    fingerprint = opened.provider.space(task).fingerprint().hex()
                    assert answer[task]["fingerprint"] == fingerprint, "another process has a different space"
                    there = np.array(answer[task]["vectors"], np.float32)
                    self._require_near(
                        there, opened.embed(self.texts, task), "the vectors from another process and from this process"
                    )

    def test_close_twice_does_nothing(self) -> None:
        with self._open() as opened:
            opened.embed(self.texts[:1])
            opened.provider.close()
            opened.provider.close()

    # --- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[_OpenProvider]:
        provider = self.make()
        try:
            # Each provider has its own event loop, because an async client belongs to the loop that first used it.
            with asyncio.Runner() as runner:
                yield _OpenProvider(provider, runner, self.tasks[0])
        finally:
            provider.close()

    def _require_near(self, found: NDArray[Any], expected: NDArray[Any], what: str) -> None:
        assert found.shape == expected.shape, f"{what} differ in shape: {found.shape} and {expected.shape}"
        if self.tolerance == 0.0:
            assert np.array_equal(found, expected), f"{what} differ; tolerance is 0.0"
            return
        off = float(np.max(np.abs(found - expected)))
        assert off <= self.tolerance, f"{what} differ by up to {off:.2g}; tolerance is {self.tolerance:g}"

    def _require_vector_or_refusal(self, text: str, what: str, *, full: bool = False) -> None:
        """Require a valid vector, a row that is None for ``text``, or a TextRefused.

        The TextRefused must have either no positions or only the position of ``text``.

        A wrong position would make the cache leave a valid text out of the retry. With ``full``, also try ``text`` at
        the end of a full batch.
        """
        with self._open() as opened:
            good = self.texts[0]
            self._check_vector_or_refusal(opened, [text], 0, what)
            if opened.provider.limits.max_batch >= 3:
                self._check_vector_or_refusal(opened, [good, text, good], 1, what)
            if full and (largest := min(self.most, opened.provider.limits.max_batch)) > 3:
                # A provider that sends the batch in parts must still report the position in the whole batch.
                self._check_vector_or_refusal(opened, [good] * (largest - 1) + [text], largest - 1, what)

    def _check_vector_or_refusal(self, opened: _OpenProvider, texts: list[str], place: int, what: str) -> None:
        refused: TextRefused | None = None
        vectors = np.ones((1, 1))
        try:
            answer = opened.answer(texts)
            if isinstance(answer, Embedded) and any(row is None for row in answer.vectors):
                without = [number for number, row in enumerate(answer.vectors) if row is None]
                assert without == [place], f"{what}: only the row of this text may be None, got rows {without}"
                return
            vectors = _check_array(answer, len(texts))
        except TextRefused as error:
            refused = error
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}; raise TextRefused instead") from error
        positions = refused.positions if refused is not None else ()
        assert positions in ((), (place,)), (
            f"{what}: TextRefused.positions must contain the position of this text in the whole batch: "
            f"expected ({place},), got {positions}"
        )
        assert np.isfinite(vectors).all(), f"{what} has a vector with NaN or infinity; raise TextRefused instead"
        assert vectors.any(axis=1).all(), f"{what} has a vector of zeros; raise TextRefused instead"


def _check_numbers(numbers: Any, count: int, what: str) -> None:
    assert len(numbers) == count, f"{what} must have one number per text: got {len(numbers)} for {count} texts"
    for number in numbers:
        is_valid = isinstance(number, int) and number >= 0
        assert is_valid, f"{what} must have ints of at least 0, got {number!r}"


class _OpenProvider:
    """A provider and the event loop that it runs in."""

    def __init__(self, provider: Any, runner: asyncio.Runner, task: str) -> None:
        self.provider = provider
        self._runner = runner
        self._task = task

    def answer(self, texts: Sequence[str], task: str | None = None, *, asynchronous: bool = False) -> Any:
        """Return the answer of the provider without checking it."""
        task = self._task if task is None else task
        if asynchronous or not hasattr(self.provider, "embed"):
            return self.run(self.provider.aembed(texts, task))
        return self.provider.embed(texts, task)

    def embed(self, texts: Sequence[str], task: str | None = None, *, asynchronous: bool = False) -> NDArray[Any]:
        """Return the vectors, shape (n, d), after checking shape and dtype."""
        return _check_array(self.answer(texts, task, asynchronous=asynchronous), len(texts))

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the provider's event loop."""

        async def run_with_timeout() -> Any:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await coroutine

        return self._runner.run(run_with_timeout())


def _get_vectors(answer: Any) -> Any:
    return answer.vectors if isinstance(answer, Embedded) else answer


def _check_tokens(tokens: Any, count: int) -> None:
    numbers = [tokens]
    if isinstance(tokens, Sequence | np.ndarray) and not isinstance(tokens, str | bytes):
        numbers = list(tokens)
        assert len(numbers) == count, (
            f"Embedded.tokens has {format_count(len(numbers), 'number')} for {format_count(count, 'text')}; return one "
            "number per text, or one int for the whole call"
        )
    for number in numbers:
        is_number = isinstance(number, int | np.integer) and not isinstance(number, bool)
        assert number is None or (is_number and number >= 0), (
            f"Embedded.tokens must be None, an int of at least 0, or one such number per text; got {number!r}"
        )


def _check_array(answer: Any, count: int) -> NDArray[Any]:
    vectors = np.asarray(_get_vectors(answer))
    assert vectors.ndim == 2, f"vectors must have shape (n, d), got {vectors.shape}"
    assert np.issubdtype(vectors.dtype, np.floating), f"vectors must have a floating dtype, got {vectors.dtype}"
    assert len(vectors) == count, (
        f"the provider returned {format_count(len(vectors), 'vector')} for {format_count(count, 'text')}"
    )
    return vectors


register_standard_tests(ProviderContract)
