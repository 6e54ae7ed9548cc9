"""Parallel-aware layers. Activations are [tokens, hidden] with tokens = batch × sequence; an ``Axis`` is passed in.

Under sequence parallelism (``sp``) whatever acts on single tokens (norms, dropout, residuals) sees a contiguous
1/tp slice of the tokens; column-parallel layers gather it, row-parallel layers reduce-scatter back to it
(Korthikanti et al. 2022).
"""
