"""Item vectors → semantic IDs."""
