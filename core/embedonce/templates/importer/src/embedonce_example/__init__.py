"""An importer for embedonce."""
