"""Training data: the indexed token format, and what reads batches from it."""
