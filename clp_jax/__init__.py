"""clp_jax: distributed training of steerable language policies on JAX."""

__version__ = "0.1.0"
