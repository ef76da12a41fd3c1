"""The memory backend passes the public contract for backends. (The other backends' test files run it for them.)"""

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
