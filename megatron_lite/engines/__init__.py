"""Engines: who owns gradients, their reduction, and the optimizer."""
