"""Every run draws the same examples, so that what passes once passes again; raise ``max_examples`` to search."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
