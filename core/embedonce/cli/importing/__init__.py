"""``embedonce import``: reading a source, verifying its vectors, and storing them."""
