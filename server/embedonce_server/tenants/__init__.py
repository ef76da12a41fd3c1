"""The callers of the server: their keys, their rates and their budgets."""
