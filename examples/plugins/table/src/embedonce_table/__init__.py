"""A SQLite table as a tier of embedonce."""
