"""What happens around a model: the plan of degrees, the engine that owns gradients and the optimizer, recomputation."""
