"""Trains the dictionaries of the bundled model: transcoders of its MLPs, autoencoders of its streams and attention."""
