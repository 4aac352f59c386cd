"""Tasks and pairs: what a model is asked, in clean and corrupt form, with the answers."""
