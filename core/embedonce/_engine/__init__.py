"""The engine of a cache: the read-through plan, its tiers and what they share. Private; users import ``embedonce``."""
