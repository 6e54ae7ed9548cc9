"""Adapters in checkpoints: which base they belong to, merging, and the peft library's folders."""
