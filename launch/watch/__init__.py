"""Ranks watched to their end: the supervisor, the shim around each rank, and the first cause of a failure."""
