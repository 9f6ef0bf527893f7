"""Studies of the method: sweeps, benchmarks and the demo."""
