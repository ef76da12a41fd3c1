"""Any py-key-value-aio store as a tier of embedonce."""
