"""How plugins are found, loaded and asked for their options. Private; users import ``embedonce.plugins``."""
