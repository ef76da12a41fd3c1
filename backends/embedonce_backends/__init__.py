"""The backends that come with embedonce: one file, one plugin, loaded by name."""
