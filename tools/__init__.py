"""What makes the data of the package: the bundled model, the published circuits. Not in the wheel."""
