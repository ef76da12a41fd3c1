"""LMDB as a tier of embedonce."""
