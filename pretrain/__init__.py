"""FLSL pre-training: views, data, objective, model, schedules, trainer and hooks.

Imported from a checkout. Follow one image: ``data`` reads it, ``views`` cuts and augments it,
``model`` encodes it as student and teacher, ``objective`` compares, ``trainer`` steps and
``checkpoint`` keeps the teacher for detection.
"""
