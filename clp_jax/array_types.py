"""Array annotations used throughout clp_jax.

Shapes are written in the string of a jaxtyping annotation, ``Float[Array, "B T D"]``, with these dimension letters:

====== ==========================   ====== ==========================
letter dimension                    letter dimension
====== ==========================   ====== ==========================
``B``  batch                        ``E``  experts
``S``  input positions              ``C``  expert capacity
``T``  target positions             ``V``  vocabulary
``D``  model                        ``L``  layers
``F``  feed-forward                 ``R``  adapter rank
``N``  query heads                  ``K``  objectives
``G``  key/value heads              ``M``  mixture components
``H``  head size                    ``P``  packed examples of a row
====== ==========================   ====== ==========================

The tests import the package through jaxtyping's hook, which checks the annotations at run time with beartype.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num, PRNGKeyArray, PyTree, Shaped, UInt32

if TYPE_CHECKING:
    from jax import Array
else:
    # Where a program is compiled and not run, shapes stand for its arrays.
    Array = jax.Array | jax.ShapeDtypeStruct

# What crosses from the host to the device.
ArrayLike: TypeAlias = Array | np.ndarray

# A nested dictionary of arrays keyed by parameter name: what `nnx.split` yields as a pure tree.
Params: TypeAlias = dict[str, Any]

# Metrics of one step: scalars, still on the device.
Metrics: TypeAlias = dict[str, Array]


def stand_in(shape: tuple[int, ...], dtype: Any) -> "Array":
    """A shape in place of an array, where a program is compiled and not run."""
    found: Any = jax.ShapeDtypeStruct(shape, dtype)
    return found


__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Metrics",
    "Num",
    "PRNGKeyArray",
    "Params",
    "PyTree",
    "Shaped",
    "UInt32",
    "stand_in",
]
