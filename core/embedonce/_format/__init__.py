"""Vectors in memory and as bytes. Private; users import ``embedonce.vectors``."""
