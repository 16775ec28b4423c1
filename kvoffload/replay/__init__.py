"""Request traces through the real Manager without moving a byte: sizing before buying."""
