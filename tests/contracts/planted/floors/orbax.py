# at: clp_jax/training/loop.py
import orbax.checkpoint as ocp
# at: clp_jax/evaluate.py


def load():
    from orbax import checkpoint


# wrong: clp_jax/training/loop.py:1: imports orbax.checkpoint: one module knows the format of checkpoints
# wrong: clp_jax/evaluate.py:4: imports orbax.checkpoint: one module knows the format of checkpoints
