"""The Redis tier: frames under keys of one server, a cluster, or a master behind sentinels."""

from .backend import RedisBackend, api, embedonce_backends

__all__ = ["RedisBackend", "api", "embedonce_backends"]
