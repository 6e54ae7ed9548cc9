"""How a job's ranks are started: one file a launcher, one line in ``registry.py``."""
