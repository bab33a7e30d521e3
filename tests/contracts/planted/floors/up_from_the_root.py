# at: clp_jax/__init__.py
from clp_jax import preferences
# wrong: imports clp_jax.preferences: imports point down only: F-1 imports F0
