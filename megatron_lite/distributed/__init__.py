"""Ranks, mesh axes, collectives and shards: everything that deals with more than one process."""
