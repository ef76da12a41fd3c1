"""The memory backend passes the contract that strangers' backends are held to. (The disk's is in ``test_disk.py``.)"""

from __future__ import annotations

from typing import ClassVar, Literal

from embedonce.testing import BackendContract
from embedonce_backends.memory import MemoryBackend


class MemoryContract(BackendContract):
    policy: ClassVar[Literal["segmented", "lru"]]

    def make(self) -> MemoryBackend:
        return MemoryBackend(policy=self.policy, max_bytes=2**26)


class TestMemorySegmented(MemoryContract):
    policy = "segmented"


class TestMemoryLru(MemoryContract):
    policy = "lru"
