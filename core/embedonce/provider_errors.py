"""What an exception of a provider says: its HTTP status, and how long to wait before the next call.

Each vendor's client has exceptions of its own, and none of them needs to be installed to read them.
"""

from ._engine.refusals import read_status, read_wait

__all__ = ["read_status", "read_wait"]
