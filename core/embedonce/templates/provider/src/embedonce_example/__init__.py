"""A provider for embedonce."""
