"""The disk tier: frames in one SQLite file in a folder."""

from .backend import DiskBackend, api, embedonce_backends
from .layout import BytesDisk

__all__ = ["BytesDisk", "DiskBackend", "api", "embedonce_backends"]
