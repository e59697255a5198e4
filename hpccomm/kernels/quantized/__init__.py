"""Elements of 16, 8 or 2 bits."""
