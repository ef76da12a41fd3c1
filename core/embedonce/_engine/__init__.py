"""The private engine of a cache: the read-through plan, the tiers, and the state that they share."""
