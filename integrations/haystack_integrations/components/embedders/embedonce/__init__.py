"""Haystack embedders with a cache. They wrap an existing embedder, or use a provider of embedonce."""

try:
    from .document_embedder import CachedDocumentEmbedder
    from .text_embedder import CachedTextEmbedder
except ModuleNotFoundError as error:
    if error.name != "haystack":
        raise
    raise ImportError("Haystack is not installed: pip install 'embedonce[haystack]'") from error

__all__ = ["CachedDocumentEmbedder", "CachedTextEmbedder"]
