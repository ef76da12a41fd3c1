"""Stores entries in a bundle: an immutable folder of sorted Arrow files that any process can open."""
