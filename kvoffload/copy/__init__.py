"""Copy engines between arena slots and paged KV blocks."""
