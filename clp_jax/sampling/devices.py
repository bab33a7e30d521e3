"""The devices that answer: copies of a policy with a share of the rows each, its layers split where one has no room for it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax

from clp_jax.partitioning import Rules, make_mesh, use_mesh

# As rollouts are made (`gin_configs/sharding/rollouts.gin`).
RULES = Rules(
    table=(
        ("batch", "data"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("vocab", "tensor"),
        ("act_heads", "tensor"),
        ("act_mlp", "tensor"),
        ("act_vocab", "tensor"),
    )
)


@dataclasses.dataclass(frozen=True)
class Devices:
    """Which of this process's devices answer, as a user asks for them.

    Attributes:
        tensor: devices that share the layers of one copy of the policy, for one that is too large for a device.
        replicas: copies of the policy, each of which has an equal share of the rows; by default as many as there are devices
            for and as share the rows equally. A CPU is one device, unless ``JAX_NUM_CPU_DEVICES`` says otherwise.
    """

    tensor: int = 1
    replicas: int | None = None

    @contextlib.contextmanager
    def use(self, rows: int) -> Iterator[None]:
        """Loads policies onto these devices, and generates and scores on them, inside the context.

        Args:
            rows: prompts at once.

        Raises:
            ValueError: when there are fewer devices, or rows can't be shared equally.
        """
        devices = jax.local_devices()
        if not 1 <= self.tensor <= len(devices):
            raise ValueError(f"tensor is {self.tensor}: expected 1 to {len(devices)}, the devices there are.")
        most = len(devices) // self.tensor
        if self.replicas is None:
            replicas = math.gcd(most, rows)
        else:
            replicas = self.replicas
            if not 1 <= replicas <= most:
                raise ValueError(
                    f"replicas is {replicas}: expected 1 to {most}, as the {len(devices)} devices are, {self.tensor} a copy."
                )
            if rows % replicas:
                raise ValueError(
                    f"replicas is {replicas}: expected a divisor of the {rows} prompts at once (batch_size)."
                )
        if replicas * self.tensor == 1:
            yield
            return
        mesh = make_mesh(data=replicas, tensor=self.tensor, devices=devices[: replicas * self.tensor])
        with use_mesh(mesh, RULES):
            yield
