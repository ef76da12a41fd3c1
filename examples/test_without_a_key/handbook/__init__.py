"""Finds the passages of a handbook that answer a question."""
