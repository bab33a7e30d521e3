"""Rotary position embeddings (arXiv 2104.09864), with the ways they are stretched to longer inputs."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (arXiv 2306.15595).

    Attributes:
        factor: at least 1.
    """

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow rotations are divided by a factor, fast ones kept, those between interpolated.

    Attributes:
        factor: at least 1.
        low_frequency_factor: rotations slower than ``original_length / this`` are divided.
        high_frequency_factor: rotations faster than ``original_length / this`` are kept.
        original_length: positions in pretraining.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): interpolation by the number of turns in the original length, and a temperature.

    Attributes:
        factor: at least 1.
        original_length: positions in pretraining.
        beta_fast: rotations that turn at least this often in the original length are kept.
        beta_slow: rotations that turn at most this often are divided by the factor.
        attention_factor: multiplies queries and keys; None is ``0.1 ln(factor) + 1``.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair ``i`` of a head's ``H`` features, ``(x[i], x[i + H/2])``, turns by ``position·f_i``.

    Attributes:
        theta: base; ``f_i = theta**(-2i / H)``.
        scaling: how frequencies are stretched; None leaves them alone.
        fraction: of a head's features that are rotated, the first ones; in (0, 1].
    """

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    fraction: float = 1.0

    def __post_init__(self):
        if not self.theta > 1:
            raise ValueError(f"Rope.theta is {self.theta}: expected a number above 1.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Rope.fraction is {self.fraction}: expected a number in (0, 1].")
        if self.scaling is not None and not self.scaling.factor >= 1:
            raise ValueError(f"Rope.scaling.factor is {self.scaling.factor}: expected at least 1.")

    def check(self, head_dim: int) -> None:
        """Checks that heads of this size can be rotated.

        Raises:
            ValueError: when the rotated features are not an even number, at least 2.
        """
        rotated = head_dim * self.fraction
        if rotated != int(rotated) or int(rotated) % 2 or rotated < 2:
            raise ValueError(
                f"rotary positions turn {rotated:g} of {head_dim} features of a head: expected an even number."
            )

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "half"]:
        """Radians per position, of every rotated pair."""
        size = int(head_dim * self.fraction)
        plain = 1.0 / self.theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
        scaling = self.scaling
        if isinstance(scaling, LinearScaling):
            return (plain / scaling.factor).astype(np.float32)
        if isinstance(scaling, Llama3Scaling):
            length = scaling.original_length
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            turns = length * plain / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)
        if isinstance(scaling, YarnScaling):
            low, high = (
                size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
            ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
            return (plain / scaling.factor * ramp + plain * (1 - ramp)).astype(np.float32)
        return plain

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if not isinstance(self.scaling, YarnScaling):
            return 1.0
        factor = self.scaling.attention_factor
        return 0.1 * math.log(self.scaling.factor) + 1.0 if factor is None else factor


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "b T"]) -> Float[Array, "b T turned"]:
    """Cosines, then sines, of every rotated pair at every position; float32."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rope.frequencies(head_dim))[None, None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * rope.magnitude


def rotate(x: Float[Array, "B T N H"], turned: Float[Array, "b T turned"]) -> Float[Array, "B T N H"]:
    """Turns every head's features, in float32; the result has the type of `x`.

    Args:
        x: queries or keys.
        turned: what `rotation` gave; may lead with 1.
    """
    size = turned.shape[-1]
    cos, sin = (part[:, :, None] for part in jnp.split(turned, 2, axis=-1))
    wide = x[..., :size].astype(jnp.float32)
    left, right = jnp.split(wide, 2, axis=-1)
    out = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
    return out if size == x.shape[-1] else jnp.concatenate([out, x[..., size:]], axis=-1)
