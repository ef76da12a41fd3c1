"""A dry run of ``embedonce embed``: it reads the input and looks up the texts, and estimates what a run would cost.

Nothing is computed or stored, and no text is sent to the provider.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from embedonce._messages import format_count
from embedonce.prices import EXAMPLE, Price, format_money

from .failures import Failures
from .progress import format_seconds
from .run import Stopped, describe_empty_input, read_passages, split_windows
from .summary import Summary, describe_left_out, format_share

if TYPE_CHECKING:
    from embedonce.answers import Estimate
    from embedonce.cache import Cache

    from .progress import Display
    from .sources import Reader


class DryRun:
    """Reads all passages of a reader and estimates what it would cost to embed them. Keeps the counts in ``summary``.

    A broken item, a text that is not valid Unicode and an empty input count as in a run.
    """

    def __init__(
        self, cache: Cache, reader: Reader, *, task: str, strict: bool = False, allow_empty: bool = False
    ) -> None:
        self._cache = cache
        self.reader = reader
        self._task = task
        self._strict = strict
        self._allow_empty = allow_empty
        self.failures = Failures()
        self.summary = Summary(unique=None, hits=dict.fromkeys(cache.tiers, 0))
        self.estimate: Estimate | None = None
        """The result. None until all passages have been read. It stays None if a run would end early."""

    def execute(self, display: Display) -> Estimate:
        """Read and look up all passages, and return the estimate.

        Raises:
            Stopped: a run would end early, because there is no passage or because of ``strict``.
        """
        started = time.monotonic()
        try:
            estimate = self._cache.estimate(self._read_texts(display), task=self._task)
            self.summary.estimate = describe_as_json(estimate)
            self._check_passages(estimate)
            self.estimate = estimate
            return estimate
        finally:
            summary, reader = self.summary, self.reader
            summary.files, summary.binary, summary.bytes = reader.files, reader.binary, reader.bytes_read
            summary.skipped, summary.failures = reader.skipped, self.failures.groups
            summary.seconds = round(time.monotonic() - started, 3)

    def _read_texts(self, display: Display) -> Iterator[str]:
        """Yield the texts of all passages, including those that cannot be embedded. Show the progress."""
        items = read_passages(self.reader, self.summary, self.failures.add_broken, self._strict)
        for passages in split_windows(items):
            display.start_window(len(passages), self.reader.bytes_read)
            self.summary.texts += len(passages)
            failed = 0
            for passage in passages:
                error = self._find_error(passage.text)
                if error is not None:
                    self.failures.add_failed(passage, error)
                    failed += 1
                yield passage.text
            self.summary.failed += failed
            if failed and self._strict:
                raise Stopped("a passage failed, and --strict is set")
            display.add_results(hits=0, others=len(passages) - failed, failed=failed)

    def _find_error(self, text: str) -> Exception | None:
        """Return the error that a run would report for a text before it calls the provider, or None."""
        try:
            self._cache.normalize(text).encode()
        except Exception:  # noqa: BLE001  (a normalisation step may raise anything)
            return self._cache.lookup([text], task=self._task).failed.get(0)
        return None

    def _check_passages(self, estimate: Estimate) -> None:
        if estimate.distinct > estimate.invalid:
            return
        if self.summary.failed:
            raise Stopped("no passage can be embedded")
        if not self._allow_empty:
            raise Stopped(f"{describe_empty_input(self.reader)}. To write an output without rows, use --allow-empty")


# --- the estimate for programs ----------------------------------------------------------------


def describe_as_json(estimate: Estimate) -> dict[str, Any]:
    """Return the fields of an estimate. An amount of money is a text with its currency."""
    price = estimate.price

    def format_price(tokens: int) -> str | None:
        return None if price is None else f"{price.of(tokens):f} {price.currency}"

    return asdict(estimate) | {
        "price": None if price is None else str(price),
        "money": format_price(estimate.tokens),
        "min_money": format_price(estimate.min_tokens),
        "max_money": format_price(estimate.max_tokens),
    }


# --- the estimate for people ------------------------------------------------------------------


def describe_dry_run(summary: Summary, estimate: Estimate, *, is_replay: bool = False) -> Iterator[str]:
    """Yield the lines of a dry run's result."""
    passages, files = format_count(summary.texts, "passage"), format_count(summary.files, "file")
    yield f"{passages} from {files}, {format_count(estimate.distinct, 'distinct text')}"
    for tier, hits in estimate.hits.items():
        if hits:
            yield f"  {format_share(hits, estimate.distinct)} in {tier}"
    yield f"  {format_share(estimate.missing, estimate.distinct)} in no tier"
    if estimate.invalid:
        yield f"  {format_share(estimate.invalid, estimate.distinct)} cannot be embedded"
    yield from describe_left_out(summary)
    if is_replay:
        yield from _describe_replay(estimate)
    elif estimate.missing:
        if estimate.max_tokens:
            yield f"tokens: {describe_tokens(estimate)}"
            yield f"price: {describe_price(estimate)}"
        else:
            yield "tokens: 0, so the price is 0"
        yield f"time of the provider's calls: {_describe_time(estimate)}"
    else:
        yield "a run would compute nothing"
    yield "nothing was computed or stored, and no text was sent to the provider"


def _describe_replay(estimate: Estimate) -> Iterator[str]:
    yield "replay mode: a run would compute nothing"
    if estimate.missing:
        yield f"replay mode: {format_count(estimate.missing, 'distinct text')} would fail, because no tier has a vector"


def describe_tokens(estimate: Estimate) -> str:
    """Return the tokens of the missing texts, how they were found, and their bounds if they are an estimate."""
    if estimate.method == "counted":
        return f"{estimate.tokens:,}, counted with the provider's tokenizer"
    tokens, low, high = round_estimate(estimate.tokens, estimate.min_tokens, estimate.max_tokens)
    if estimate.method == "guessed":
        reason = "because the tiers have too few texts with known tokens"
        return f"between {low:,} and {high:,}, guessed from the length, {reason}"
    error = max(estimate.max_tokens - estimate.tokens, estimate.tokens - estimate.min_tokens) / max(estimate.tokens, 1)
    percent = max(-int(-100 * error // 1), 1)
    return f"about {tokens:,} (± {percent:,} %), measured on {format_count(estimate.sample, 'text')} with known tokens"


def round_estimate(tokens: int, low: int, high: int) -> tuple[int, int, int]:
    """Round an estimate and its bounds, so that the larger error has two digits.

    The bounds are rounded away from the estimate.

    >>> round_estimate(1234567, 1200123, 1270123)
    (1235000, 1200000, 1271000)
    """
    unit = 10 ** max(len(str(max(high - tokens, tokens - low))) - 2, 0)
    return (tokens + unit // 2) // unit * unit, low // unit * unit, -(-high // unit) * unit


def describe_price(estimate: Estimate) -> str:
    """Return the price of the missing texts and its maximum. Without a price, say how to set one."""
    price = estimate.price
    if price is None:
        return f'unknown; to see it, write the price of the provider\'s tokens into [provider]: price = "{EXAMPLE}"'
    most = describe_most_money(price, estimate.max_tokens)
    if estimate.method == "counted":
        shown = format_money(price.of(estimate.tokens), price.currency)
    elif estimate.method == "guessed":
        shown = f"at most {most}"
    else:
        shown = f"about {format_money(price.of(estimate.tokens), price.currency)}, at most {most}"
    return f"{shown}, at {price}"


def describe_most_money(price: Price, tokens: int) -> str:
    """Return the price of a number of tokens, rounded up."""
    return format_money(price.of(tokens), price.currency, round_up=True)


def _describe_time(estimate: Estimate) -> str:
    if estimate.seconds is None:
        return "unknown, because the tiers have no text with known seconds"
    return f"about {format_seconds(estimate.seconds)}" if estimate.seconds >= 1 else "less than 1 s"


def describe_tier_errors(estimate: Estimate) -> Iterator[str]:
    """Yield one line per tier that failed."""
    for tier, cause in estimate.errors.items():
        yield f"tier {tier}: cannot be read ({cause}); its texts count as missing, so the estimate may be too high"
