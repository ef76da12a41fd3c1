"""Loopback servers that speak the protocols of embedding APIs, and misbehave on demand."""
