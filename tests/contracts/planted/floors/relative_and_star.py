# at: clp_jax/nn/mlp.py
from .linear import Linear
from clp_jax.nn.norms import *
# wrong: imports .linear.Linear: imports are absolute
# wrong: imports clp_jax.nn.norms.*: names are imported one by one
