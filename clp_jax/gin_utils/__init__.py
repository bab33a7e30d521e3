"""Gin: the only part of clp_jax that knows it. `configuration.configure` is the way in."""
