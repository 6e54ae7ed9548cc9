"""Hosts examined before a job: what runs on each, what is judged, and how it is told."""
