"""Find a plugin by its name in TOML and load only that plugin, or say what to install.

A plugin is an entry point in the group ``embedonce``, or in the group ``embedonce.importers`` if it is an importer. The
entry point's name is the plugin's name in TOML, and its value is a module with hooks (:mod:`embedonce.hookspecs`).
embedonce's own plugins are registered in the same way.
"""

from ._config.inspection import InstalledPlugin, installed
from ._plugins.entry_points import DISABLE, installed_by_embedonce, names, restrict_plugins
from ._plugins.loading import HOOKS, Kind, backend, importer, listeners, normalizer, provider

__all__ = [
    "DISABLE",
    "HOOKS",
    "InstalledPlugin",
    "Kind",
    "backend",
    "importer",
    "installed",
    "installed_by_embedonce",
    "listeners",
    "names",
    "normalizer",
    "provider",
    "restrict_plugins",
]
