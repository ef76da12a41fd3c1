"""The task of a request, from the fields with which the APIs of several vendors name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .api_errors import ApiError

TASK_FIELDS: Final = ("input_type", "task", "task_type")
"""``input_type``: Cohere, Voyage, NVIDIA. ``task``: Jina. ``task_type``: Gemini."""

_NAMES: Final = frozenset(TASK_FIELDS)

MAX_TASK = 64

_TASKS: Final = {
    "query": "query",
    "search_query": "query",
    "retrieval_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval_document": "document",
    "retrieval.passage": "document",
    "retrieval.document": "document",
}
"""The vendors' names of embedonce's two tasks, in lowercase."""


def read_task(data: Mapping[str, Any]) -> str:
    """Return the task that a request names; ``"document"`` if it names none.

    Names of other tasks, such as ``classification``, are passed on in lowercase.

    Raises:
        ApiError: the name is not a short string, or two fields name different tasks.
    """
    if _NAMES.isdisjoint(data):
        return "document"
    task = None
    for field in TASK_FIELDS:
        name = data.get(field)
        if name is None:
            continue
        if type(name) is not str or not 0 < len(name) <= MAX_TASK or not (name.isascii() and name.isprintable()):
            raise ApiError(400, f"{field} must be a task such as query or document", param=field)
        lowered = name.strip().lower()
        meant = _TASKS.get(lowered, lowered)
        if not meant:
            raise ApiError(400, f"{field} must be a task such as query or document", param=field)
        if task is not None and meant != task:
            given = [name for name in TASK_FIELDS if data.get(name) is not None]
            message = f"{' and '.join(given)} name different tasks; send only one of these fields"
            raise ApiError(400, message, param=field)
        task = meant
    return task or "document"


def find_task_field(data: Mapping[str, Any]) -> str | None:
    """Return the field that names the task of a request, or None."""
    return next((field for field in TASK_FIELDS if data.get(field) is not None), None)
