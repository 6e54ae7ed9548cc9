"""Degrees, batch arithmetic, memory and the rank map, checked before any process group exists. No torch."""
