# at: clp_jax/models/config.py


def build():
    import clp_jax.train


# wrong: clp_jax/models/config.py:4: imports clp_jax.train: imports point down only: F2 imports F5
