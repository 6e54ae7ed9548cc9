"""Which hosts there are, how they are reached, what runs where, and where its ranks meet."""
