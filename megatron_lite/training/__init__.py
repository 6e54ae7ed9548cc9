"""A rank's run: the step, what it resumes from, what it reports, and its end."""
