"""Proof that two layouts train the same model."""
