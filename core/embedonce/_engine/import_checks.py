"""Refuses sources whose vectors may be those of another task than the one that they would be imported for."""

from __future__ import annotations

from embedonce._messages import quote
from embedonce.contracts import AnyProvider, Source, Task
from embedonce.errors import ImportRefused
from embedonce.tasks import TASKS

from .routes import describe_space


def check_source(source: Source, provider: AnyProvider, task: Task) -> None:
    """Check that the vectors of a source can be those of a task.

    Every source is allowed if the provider embeds this task, documents and queries in the same way.

    Raises:
        ImportRefused: the source may have vectors of several tasks under the same key, or it has vectors of another
            task, which the provider embeds differently.
        SpaceError: the provider does not know the task, or describes no vector space.
    """
    space = describe_space(provider, task)  # an unknown task is an error for every source
    if source.mixing and list_other_tasks(provider, task):
        raise ImportRefused(
            f"cannot import from {source.name}: {source.mixing}. The provider {quote(space.provider)} embeds "
            "queries and documents differently, so some of the vectors may be those of another task"
        )
    if source.task is not None and not _has_space(provider, source.task, space.fingerprint()):
        raise ImportRefused(
            f"cannot import from {source.name} for the task {quote(task)}: it has vectors of the task "
            f"{quote(source.task)}, and the provider {quote(space.provider)} embeds the two tasks differently; import "
            f"them for the task {quote(source.task)}"
        )


def list_other_tasks(provider: AnyProvider, task: Task) -> list[Task]:
    """Return the usual tasks whose vectors differ from those of ``task``. The list is empty for a symmetric provider.

    Raises:
        SpaceError: the provider does not know the task, or describes no vector space.
    """
    own = describe_space(provider, task).fingerprint()
    return [name for name in TASKS if describe_space(provider, name).fingerprint() != own]


def _has_space(provider: AnyProvider, task: Task, fingerprint: bytes) -> bool:
    try:
        return describe_space(provider, task).fingerprint() == fingerprint
    except Exception:  # noqa: BLE001  (the provider may not know the task, and may say so with any error)
        return False
