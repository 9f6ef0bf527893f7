"""Pre-training: methods, views, data, schedules, trainer and hooks. Imported from a checkout.

An image goes through ``data`` (reads it), ``views`` (cuts and augments it), a method of ``methods``
(encodes it as student and teacher, and compares) and ``trainer`` (steps); ``hooks`` writes the
teacher's encoder for downstream use.
"""
