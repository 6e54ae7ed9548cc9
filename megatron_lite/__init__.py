"""megatron_lite: train transformers with any mix of parallelism, and prove that any two layouts agree."""

__version__ = "0.1.0"
