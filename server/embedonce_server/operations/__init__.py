"""Every endpoint but that of vectors: health, metrics, the models and the administration."""
