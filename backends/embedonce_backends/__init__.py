"""The backends that come with embedonce. Each file or folder is one plugin, loaded by name."""
