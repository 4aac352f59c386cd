"""Contextual decomposition: a forward as a tape of operations, and the rules by which a relevant part is carried."""
