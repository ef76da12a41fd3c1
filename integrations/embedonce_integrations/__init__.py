"""embedonce inside other frameworks. Each module serves one framework and needs it installed."""
