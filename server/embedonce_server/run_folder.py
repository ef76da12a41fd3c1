"""The folders that the workers of one ``embedonce serve`` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A temporary folder for this run, and a folder that outlives it."""

    path: Path
    """Exists as long as the server runs. Only its user may open it. The path is short, because the name of a Unix
    socket has at most 104 characters."""
    state: Path
    """Holds the tenants' budgets and rates."""

    @property
    def metrics(self) -> Path:
        """The folder for the metrics of all workers."""
        return self.path / "metrics"

    @property
    def budgets(self) -> Path:
        return self.state / "budgets.db"

    @property
    def rates(self) -> Path:
        return self.state / "rates"

    def get_socket(self, worker: int) -> Path:
        """Return the path of the Unix socket on which the other workers reach a worker."""
        return self.path / f"worker-{worker}.sock"
