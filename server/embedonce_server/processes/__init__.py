"""The worker processes and their supervisor: start, reload and end."""
