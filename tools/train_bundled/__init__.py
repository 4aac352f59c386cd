"""How the bundled model was made: its corpus, its recipe and its training script."""
