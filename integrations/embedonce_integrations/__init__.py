"""embedonce inside other frameworks: one module for each, imported only where its framework is."""
