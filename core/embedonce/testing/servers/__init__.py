"""Loopback servers that speak the protocols of embedding APIs, and misbehave when they are told to."""
