# at: clp_jax/nn/first.py
import clp_jax.nn.second
# at: clp_jax/nn/second.py
from clp_jax.nn.third import x
# at: clp_jax/nn/third.py
from clp_jax.nn import first
# wrong: clp_jax.nn.first -> clp_jax.nn.second -> clp_jax.nn.third -> clp_jax.nn.first: imports go round
