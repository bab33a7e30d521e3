"""Inherits too deeply."""


class First(list):
    """One."""


class Second(First):
    """Two."""


class Third(Second):
    """Three."""


# wrong: clp_jax.depth.Third: inherits through 3 classes: expected at most 2
