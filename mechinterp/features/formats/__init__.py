"""Readers of feature bases as other tools store them, one file a tool; tensors only."""
