"""What a store of several nodes raises for one of them."""

from embedonce.errors import TierBusy


class NodeDown(TierBusy):
    """A node does not answer and others do: an error, but no reason to leave the whole tier out."""


class NodeTimeout(NodeDown, TimeoutError):
    """A node did not answer in time and others do."""
