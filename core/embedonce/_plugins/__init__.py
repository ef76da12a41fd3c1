"""Find plugins, load them, and read their options. Private; users import ``embedonce.plugins``."""
