"""The importers that come with embedonce. Each module is one plugin and imports its library only when it is used."""
