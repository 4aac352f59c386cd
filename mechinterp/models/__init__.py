"""Models: loading them, and the pure maps of one model."""
