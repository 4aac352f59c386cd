"""Contextual decomposition: every activation split into a relevant and an irrelevant part, carried forward."""
