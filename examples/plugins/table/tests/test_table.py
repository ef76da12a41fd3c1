import tempfile
from pathlib import Path

import pytest
from embedonce_table.backend import TableBackend

from embedonce.testing import BackendContract, ManualClock, Recipe


class TestTable(BackendContract):
    examples = 5

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path):
        self.folder = tmp_path
        self.clock = ManualClock()

    def make(self):
        return self.at(Path(tempfile.mkdtemp(dir=self.folder)) / "frames.db")

    def at(self, path):
        backend = TableBackend(path=path)
        backend.clock = self.clock
        return backend

    def reopen(self, backend):
        return self.at(backend.path)

    def recipe(self, backend):
        return Recipe(TableBackend, {"path": str(backend.path)})

    def advance(self, seconds):
        self.clock.advance(seconds)
