"""Comparisons of many runs: jobs that can be interrupted, tables of results, and a report page."""
