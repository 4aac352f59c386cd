"""Speed and memory as ratios to a floor. Run with `make benchmark` or `python -m benchmarks`."""
