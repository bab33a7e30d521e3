"""What a Hugging Face family is: a translation of settings, and a table of tensor names."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from clp_jax.interop.hf_settings import Settings
from clp_jax.interop.links import Link, link
from clp_jax.interop.slots import slots
from clp_jax.models.config import ModelConfig

# Linear layers are stored as [out, in], and biases of positions as [buckets, heads].
_TRANSPOSED = ("/kernel", "relpos_bias/embedding")


@dataclasses.dataclass(frozen=True)
class Family:
    """Checkpoints of one ``model_type``.

    Attributes:
        model_type: its name in ``config.json``.
        architecture: the class that loads it there.
        read: settings to a configuration.
        write: a configuration to the keys that we model; what the family can't express is left out.
        names: the tensor of each slot (`clp_jax.interop.slots.Slot.name`).
        defaults: of keys that older files leave out.
        copies: tensors that repeat the embedding where a file has them.
        untied_copies: whether transformers needs them where the head is not tied: its stacks then have embeddings of their own.
        head: the tensor of the head; repeats the embedding too where they are tied.
        ignored: a pattern of tensors without parameters.
    """

    model_type: str
    architecture: str
    read: Callable[[Settings], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copies: tuple[str, ...] = ()
    untied_copies: bool = False
    head: str = "lm_head.weight"
    ignored: str | None = None

    def settings(
        self, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, tensors: Any = None
    ) -> Settings:
        """A ``config.json`` with this family's defaults."""
        return Settings(values, self.defaults, generation or {}, tensors)

    def config(
        self, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, tensors: Any = None
    ) -> ModelConfig:
        """The configuration of a ``config.json``.

        Args:
            values: its keys.
            generation: those of ``generation_config.json``.
            tensors: names of the tensors, which decide what old configurations leave open; None where not known.

        Raises:
            ValueError: naming a setting that is not supported.
        """
        settings = self.settings(values, generation, tensors)
        settings.refuse(quantization_config=(None,))
        return self.read(settings)

    def links(self, config: ModelConfig) -> list[Link]:
        """The tensors of a policy's parameters."""
        found = slots(config, split_experts=True)
        return link(found, self.names, _TRANSPOSED, f"model_type {self.model_type!r}")

    def aliases(self, config: ModelConfig) -> dict[str, str]:
        """Tensors that may repeat another one."""
        heads = (self.head,) if config.tied_head else ()
        return dict.fromkeys((*self.copies, *heads), self.names["token_embedder/embedding"])

    def needed_copies(self, config: ModelConfig) -> tuple[str, ...]:
        """Tensors that must repeat the embedding."""
        return self.copies if self.untied_copies and not config.tied_head else ()

    def repeated(self, config: ModelConfig, copies: Iterable[str]) -> list[Link]:
        """Links of the tensors among `copies` that repeat the embedding of a policy."""
        original = next(each for each in self.links(config) if each.name == self.names["token_embedder/embedding"])
        return [dataclasses.replace(original, name=name) for name in copies if name in self.aliases(config)]

    def tensors_of(self, config: ModelConfig) -> set[str]:
        """Names of the tensors of a policy."""
        return {each.name for each in self.links(config)}
