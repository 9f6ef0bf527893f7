"""Pre-training methods, one module each."""
