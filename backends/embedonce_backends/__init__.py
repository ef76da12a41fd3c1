"""The backends that come with embedonce: one file or folder, one plugin, loaded by name."""
