"""The doctor: examines hosts before a job is started on them."""
