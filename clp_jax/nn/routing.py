"""Stand-in."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    k: int = 1

    def check(self, causal):
        pass

    @property
    def experts_per_token(self):
        return self.k


class ExpertChoice(TokenChoice):
    pass


class Dropless(TokenChoice):
    pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStatistics:
    pass
