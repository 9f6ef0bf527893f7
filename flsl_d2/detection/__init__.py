"""Detectors: training, evaluation and checks of their input."""
