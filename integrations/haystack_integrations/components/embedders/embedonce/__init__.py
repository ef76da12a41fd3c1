"""Haystack components that embed each text once."""
