"""The Postgres tier: one row per key."""

from .backend import PostgresBackend, api, embedonce_backends

__all__ = ["PostgresBackend", "api", "embedonce_backends"]
