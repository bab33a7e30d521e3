# at: clp_jax/nn/linear.py
from clp_jax.models.config import T5Config
# wrong: imports clp_jax.models.config: imports point down only: F1 imports F2
