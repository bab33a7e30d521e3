# at: clp_jax/data/reader.py


def read():
    import tensorflow as tf


def count():
    from seqio import Task


# wrong: clp_jax/data/reader.py:4: imports tensorflow: data is prepared apart from training
# wrong: clp_jax/data/reader.py:8: imports seqio.Task: data is prepared apart from training
