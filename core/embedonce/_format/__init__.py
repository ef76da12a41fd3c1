"""Vectors in memory and as bytes. This package is private; import ``embedonce.vectors``."""
