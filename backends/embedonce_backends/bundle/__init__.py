"""Stores entries in a bundle: an immutable folder of sorted Arrow files that any process can open."""

from .backend import BundleBackend, api, embedonce_backends
from .writing import BundleWriter

__all__ = ["BundleBackend", "BundleWriter", "api", "embedonce_backends"]
