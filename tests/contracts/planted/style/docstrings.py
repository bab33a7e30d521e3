class Silent:
    def method(self):
        """no sentence"""

    def _private(self):
        pass


def function(x):
    return x


# wrong: clp_jax/docstrings.py: has no docstring that ends its first sentence
# wrong: clp_jax/docstrings.py:1: Silent has no docstring
# wrong: clp_jax/docstrings.py:2: Silent.method has no docstring
# wrong: clp_jax/docstrings.py:9: function has no docstring
