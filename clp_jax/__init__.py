"""clp_jax: distributed training of steerable language policies on JAX."""

from pathlib import Path

__version__ = "0.1.0"

# An installation has `launch`, `tasks` and `gin_configs` inside; in a checkout they lie beside this folder, and those that are
# meant are these, whatever else is installed.
_checkout = Path(__file__).parents[1]
if (_checkout / "pyproject.toml").is_file() and (_checkout / "launch" / "__init__.py").is_file():
    __path__.append(str(_checkout))
