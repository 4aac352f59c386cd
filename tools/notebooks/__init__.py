"""`python -m tools.notebooks`: runs the notebooks, stores what they show, and compares it with another run."""
