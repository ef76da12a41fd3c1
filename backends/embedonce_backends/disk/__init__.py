"""The disk tier: frames in one SQLite file of a folder."""

from .backend import BytesDisk, DiskBackend, api, embedonce_backends

__all__ = ["BytesDisk", "DiskBackend", "api", "embedonce_backends"]
