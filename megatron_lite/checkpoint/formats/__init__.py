"""Checkpoints that others wrote, as sources of ours: a format a file."""
