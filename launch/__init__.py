"""Starts the ranks of a training job, watches them, and ends them. Imports neither torch nor ``megatron_lite``."""
