"""Comments that were code."""


def f(x):
    """Gives it back."""
    # assert x > 0
    # An assertion in a sentence is not code; `assert x` neither.
    return x


# wrong: clp_jax/comments.py:6: code that is commented out
