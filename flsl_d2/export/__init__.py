"""Encoders and detectors for other programs: graphs, checked files, and a card beside each."""
