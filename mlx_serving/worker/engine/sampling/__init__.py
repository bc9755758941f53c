"""One sampler for the whole batch: a reference in pure MLX and fused kernels that equal it."""
