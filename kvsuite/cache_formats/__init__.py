"""Number formats of stored keys and values: names, bytes, and the reference that packs and unpacks them."""
