"""Governs the caches of a test session: the plugin of pytest records and replays vectors with it."""

from embedonce._engine.governing import STORE, Answered, Governor, govern_chains

__all__ = ["STORE", "Answered", "Governor", "govern_chains"]
