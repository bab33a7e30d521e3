"""Settings in a Hugging Face ``config.json``: read with their defaults, refused where they ask for what we don't have."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from clp_jax.interop.hf_keys import KINDS, checked
from clp_jax.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

# Names of activations there, and ours.
ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
}

# Each of these has a tensor of its own.
_COUNTED = ("num_hidden_layers", "num_layers", "num_decoder_layers", "num_experts", "num_local_experts")

_SCALINGS = ("default", "linear", "llama3", "yarn")
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A ``config.json`` and what goes with it.

    Attributes:
        values: its keys.
        defaults: of the family, where a key is not there.
        generation: ``generation_config.json``; empty without one.
        tensors: names of the tensors; None where they are not known.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Collection[str] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        """A key's value, or the family's default.

        Raises:
            ValueError: when there is neither, or the value is of another kind than the key's.
        """
        if key not in self.values and key in self.defaults:
            return self.defaults[key]
        if key not in self.values:
            raise ValueError(f"config.json has no {key!r}, which this model_type needs: add it.")
        return self.given(key)

    def given(self, key: str) -> Any:
        """A key's value, or None where it is not there: defaults don't count.

        Raises:
            ValueError: when the value is of another kind than the key's.
        """
        return checked(key, self.values[key]) if key in self.values else None

    def generated(self, key: str) -> Any:
        """What the generation says, or None.

        Raises:
            ValueError: when the value is of another kind than the key's.
        """
        return checked(key, self.generation.get(key), file="generation_config.json")

    def refuse(self, **supported: Collection[Any]) -> None:
        """Checks settings that we have one form of.

        Args:
            **supported: the values of each key that mean what we do; a key that is not there is one.

        Raises:
            ValueError: naming the key, its value, and what is supported.
        """
        for key, known in supported.items():
            if key in self.values and self.values[key] not in known:
                raise unsupported(key, self.values[key], [repr(value) for value in known])

    def check_counts(self) -> None:
        """Checks that there are as many tensors as layers and experts, before anything is made for each of these.

        Raises:
            ValueError: naming the key, its value, and the number of tensors.
        """
        found = len(self.tensors or ())
        for key in _COUNTED:
            number = self.given(key)
            if number is not None and number > found:
                raise ValueError(
                    f"config.json: {key} is {number}: expected at most {found}, the tensors that there are. Is the "
                    "configuration another model's?"
                )

    def activation(self, name: str, key: str) -> str:
        """Our name of an activation."""
        if name not in ACTIVATIONS:
            raise unsupported(key, name, ACTIVATIONS)
        return ACTIVATIONS[name]

    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the generation's, where it says."""
        value = self.generated("eos_token_id")
        value = self["eos_token_id"] if value is None else value
        if value is None or value == []:
            raise ValueError(
                "config.json and generation_config.json have no eos_token_id: expected a token or several that end a "
                "completion; add it to generation_config.json."
            )
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    def pad_id(self) -> int:
        """The padding, or -1 where it could be a token of the text."""
        pad = self["pad_token_id"]
        is_text = pad is None or pad < 0 or pad in self.eos_ids() or pad == self["bos_token_id"]
        return -1 if is_text else pad


def unsupported(key: str, value: Any, known: Collection[str]) -> ValueError:
    """A setting that can't be had."""
    return ValueError(f"config.json: {key} is {value!r}, which is not supported: expected one of {', '.join(known)}.")


def activation_name(ours: str) -> str:
    """The name there of one of our activations."""
    return next(name for name, known in ACTIVATIONS.items() if known == ours)


def read_rope(given: Mapping[str, Any], theta: float, settings: Settings, key: str = "rope_parameters") -> Rope:
    """Rotary positions.

    Args:
        given: ``rope_parameters``, or the older ``rope_scaling``; empty for plain ones.
        theta: where `given` has none.
        settings: that they are of.
        key: for messages.

    Raises:
        ValueError: for a kind of scaling that we don't have.
    """
    given = {name: checked(name, value, key) if name in KINDS else value for name, value in given.items()}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALINGS:
        raise unsupported(f"{key}.rope_type", kind, _SCALINGS)
    unknown = set(given) - _ROPE_KEYS
    if unknown:
        name = min(unknown)
        raise unsupported(f"{key}.{name}", given[name], ["no such key"])
    for name, known in (("truncate", (True, None)), ("partial_rotary_factor", (1, None))):
        if given.get(name) not in (*known, None):
            raise unsupported(f"{key}.{name}", given[name], [repr(known[0])])
    return Rope(theta=float(given.get("rope_theta") or theta), scaling=_read_scaling(kind, given, settings, key))


def _read_scaling(
    kind: str, given: Mapping[str, Any], settings: Settings, key: str
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    def number(name: str) -> float:
        if given.get(name) is None:
            raise ValueError(f"config.json: {key} of type {kind!r} has no {name!r}: add it.")
        return float(given[name])

    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(number("factor"))
    longest = settings["max_position_embeddings"]
    original = settings.given("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = int(original or longest)
    if kind == "llama3":
        return Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    factor = longest / original if given.get("factor") is None else number("factor")
    plain = YarnScaling(factor, original, float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1), None)
    magnitude = given.get("attention_factor")
    if magnitude is None and given.get("mscale") and given.get("mscale_all_dim"):
        one = Rope(scaling=plain).magnitude - 1
        magnitude = (1 + given["mscale"] * one) / (1 + given["mscale_all_dim"] * one)
    return dataclasses.replace(plain, attention_factor=None if magnitude is None else float(magnitude))


def write_scaling(rope: Rope) -> dict[str, Any] | None:
    """The older ``rope_scaling``, which every version reads; None for plain positions."""
    scaling = rope.scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    found = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    return found | ({} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor})
