"""An object store as a tier of embedonce."""
