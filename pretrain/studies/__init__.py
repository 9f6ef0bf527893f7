"""What stands on the method: sweeps, benchmarks and the demo."""
