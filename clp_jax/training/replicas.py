"""Compares what several devices hold of the same arrays: they were computed alike, so all must have the same bits."""

import collections
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clp_jax import processes
from clp_jax.array_types import PyTree
from clp_jax.training.digests import digest


class ReplicaError(RuntimeError):
    """A device holds other bits of an array than the others."""

    # Started again on the same devices, the run may well be damaged again, and nobody be told.
    exit_code = processes.FAILURE


def check_replicas(tree: PyTree, step: int) -> None:
    """Compares the digests of all copies of every part of every array; each device reads what it holds once.

    All processes call it together, and come to the same result.

    Args:
        tree: arrays on one mesh.
        step: after which; for the message.

    Raises:
        ReplicaError: naming the array and the devices that have other bits than most; all of them where there is no majority.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for place, found in enumerate(_digests([leaf for _, leaf in leaves])):
        path, leaf = leaves[place]
        copies: dict[Any, dict[jax.Device, int]] = collections.defaultdict(dict)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            part = tuple(one.indices(size) for one, size in zip(index, leaf.shape, strict=True))
            copies[part][device] = found[device.id]
        for part, digests in copies.items():
            if len(set(digests.values())) > 1:
                raise ReplicaError(
                    _message(jax.tree_util.keystr(path, simple=True, separator="/"), part, digests, step)
                )


def _digests(leaves: list[jax.Array]) -> list[dict[int, int]]:
    """For each array, the digest of what each device of all processes holds, by the device's id."""
    local: dict[jax.Device, list[jax.Array]] = collections.defaultdict(list)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            local[shard.device].append(shard.data)
    rows = [_DIGEST_EACH(parts) for parts in local.values()]  # All devices at once.
    table = np.stack([np.asarray(row) for row in rows])
    ids = np.asarray([device.id for device in local], np.int32)
    if jax.process_count() > 1:
        table = multihost_utils.process_allgather(table).reshape(-1, len(leaves))
        ids = multihost_utils.process_allgather(ids).reshape(-1)
    return [dict(zip(ids.tolist(), column.tolist(), strict=True)) for column in table.T]


_DIGEST_EACH = jax.jit(lambda parts: jax.numpy.stack([digest(part) for part in parts]))


def _message(name: str, part: Any, digests: dict[jax.Device, int], step: int) -> str:
    (common, count), *_ = collections.Counter(digests.values()).most_common()
    odd = {device: value for device, value in digests.items() if value != common or 2 * count <= len(digests)}
    shown = ", ".join(
        f"device {device.id} of process {device.process_index} ({value:08x})" for device, value in odd.items()
    )
    where = "" if all(first == 0 for first, *_ in part) else f" from {tuple(first for first, *_ in part)} on"
    against = f" against {common:08x} on {count} others" if len(odd) < len(digests) else ""
    return (
        f"after step {step}, copies of {name}{where} have different bits: {shown}{against}. A device computes or keeps them "
        "wrong: take it out, and go on from the last checkpoint; `clp replay` tells which steps were damaged."
    )
