"""The check of a task's name: a provider refuses tasks that it does not know, and suggests a task that it knows."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

from ._messages import find_closest, join_words, quote
from .errors import SpaceError

TASKS: Final = ("document", "query")
"""The tasks that every provider accepts."""

LIKENESS = 0.8
"""How similar a name must be to a known task to count as misspelled, from 0 to 1.

The likeness of ``qurey`` and ``query`` is 0.8. Names that providers use have less: ``search_document`` has 0.7, and
``queries`` has 0.67.
"""


def require_task(task: Any) -> None:
    """Check that a task is a str that is not empty.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(task, str) or not task:
        raise TypeError(f'task must be a str such as "document" or "query", got {task!r}')


def check_task(
    task: str, known: Collection[str] = TASKS, *, what: str, accepts_others: bool = False, advice: str = ""
) -> None:
    """Check that a provider knows a task. A provider calls this in ``space``, so that nothing is computed or stored.

    ``what`` is the subject of the message, such as ``"provider 'openai'"``. With ``accepts_others``, the provider
    accepts every task, so only a task that looks like a misspelled name in ``known`` is refused. ``advice`` is a
    sentence that ends the message; it says how to make the task known.

    Raises:
        SpaceError: the task is unknown. The message suggests the most similar known task.
        TypeError: the task is not a str, or it is empty.
    """
    require_task(task)
    if task in known or (accepts_others and _names_a_known_task(task, known)):
        return
    # The task may be a long text that was passed in the wrong place, and comparing long texts is slow.
    likeness = LIKENESS if accepts_others else 0.6
    closest = find_closest(task.strip(), known, likeness=likeness) if len(task) <= 100 else None
    if closest is None and accepts_others:
        return
    names = join_words(map(quote, known))
    reason = f"did you mean {quote(closest)}?" if closest is not None else f"it knows {names}"
    raise SpaceError(f"{what} does not know the task {quote(task)}; {reason}{f' {advice}' if advice else ''}")


def _names_a_known_task(task: str, known: Collection[str]) -> bool:
    """Return whether a task is named after a known task, such as ``query_en`` or ``document2``."""
    words = re.findall(r"[^\W\d_]+|\d+", task)
    return len(words) > 1 and not set(words).isdisjoint(known)
