"""Haystack's embedders with a cache: wrap the one that you have, or use a provider of embedonce's."""

try:
    from .document_embedder import CachedDocumentEmbedder
    from .text_embedder import CachedTextEmbedder
except ModuleNotFoundError as error:
    if error.name != "haystack":
        raise
    raise ImportError("these components need Haystack: pip install 'embedonce[haystack]'") from error

__all__ = ["CachedDocumentEmbedder", "CachedTextEmbedder"]
