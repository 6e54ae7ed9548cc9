"""What differs between model families, as tables. No torch."""
