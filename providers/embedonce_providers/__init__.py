"""Providers that come with embedonce; each module is one plugin and imports its library when it is used."""
