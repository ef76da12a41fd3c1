"""Errors that report the failure of one node in a store that has several nodes."""

from embedonce.errors import TierBusy


class NodeDown(TierBusy):
    """Raised if a node does not answer while other nodes do.

    This error does not open the tier's breaker, because the other nodes still work.
    """


class NodeTimeout(NodeDown, TimeoutError):
    """Raised if a node does not answer in time while other nodes do."""
