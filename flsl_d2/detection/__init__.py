"""Detectors: training, evaluation, and the checks of their input."""
