"""From TOML to a checked configuration. Private; users import ``embedonce.config``."""
