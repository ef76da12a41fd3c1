"""Errors of one node in a store that has several."""

from embedonce.errors import TierBusy


class NodeDown(TierBusy):
    """A node does not answer while other nodes do. The tier's breaker stays closed, because the others still serve."""


class NodeTimeout(NodeDown, TimeoutError):
    """A node did not answer in time while other nodes do."""
