"""Ranks, mesh axes, collectives and shards: everything that knows more than one process exists."""
