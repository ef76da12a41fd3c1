"""A tier for embedonce."""
