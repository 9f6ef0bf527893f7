"""Pre-training methods: a module for each, FLSL first, behind one protocol."""

from pretrain.methods.protocol import Losses, Method, Monitored, StepInputs

__all__ = ["Losses", "Method", "Monitored", "StepInputs"]
