"""What runs the model edited: exact edge patching, first-order attribution, sweeps, decomposition."""
