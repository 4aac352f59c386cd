"""Contextual decomposition: a forward as a tape of operations, and the rules that carry a relevant part through it."""
