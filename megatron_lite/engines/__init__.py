"""Engines: they own the gradients, their reduction, and the optimizer."""
