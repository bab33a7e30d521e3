# at: clp_jax/sampling/strategies.py
from clp_jax.rewards import stack
# at: clp_jax/evaluation/pareto.py
import clp_jax.training.metrics
# at: clp_jax/objectives/kl.py
from clp_jax.nn import linear
# at: clp_jax/data/batch.py
from clp_jax.models.t5 import T5
# wrong: imports clp_jax.rewards.stack: folders on one floor do not import each other
# wrong: imports clp_jax.training.metrics: folders on one floor do not import each other
# wrong: imports clp_jax.nn.linear: folders on one floor do not import each other
# wrong: imports clp_jax.models.t5: folders on one floor do not import each other
