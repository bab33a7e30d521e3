# at: clp_jax/models/palm.py
import flax.linen as nn
from flax import linen
from jax.experimental.pjit import pjit

nnx.jit(f)
nnx.Optimizer(model)
with mesh:
    pass
getattr(self.config, "dropout", 0.0)
jax.pmap(f)
# wrong: imports flax.linen: one way to write a model
# wrong: imports flax.linen: one way to write a model
# wrong: imports jax.experimental.pjit.pjit: one way to write a model
# wrong: `with mesh`: shardings are stated
# wrong: calls nnx.jit: models are functional at the edge
# wrong: calls nnx.Optimizer: models are functional at the edge
# wrong: getattr of a configuration: name the field
# wrong: calls jax.pmap: it has a successor
