"""The memcached tier: frames on one or several memcached nodes."""

from .backend import MemcachedBackend, api, embedonce_backends

__all__ = ["MemcachedBackend", "api", "embedonce_backends"]
