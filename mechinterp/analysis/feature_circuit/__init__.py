"""Sparse feature circuits: which features of dictionaries, at which sites, make a behaviour together."""
