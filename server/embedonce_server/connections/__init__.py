"""Addresses, connections and the bounds of what a client may send and how slowly."""
