# at: clp_jax/nn/mlp.py
import jax
from jax.experimental.shard_map import shard_map
from jax import shard_map as mapped

f = jax.shard_map(g)
# at: clp_jax/nn/moe.py
import jax
from jax import shard_map

f = jax.shard_map(g)
# wrong: clp_jax/nn/mlp.py:2: imports jax.experimental.shard_map.shard_map: sharding is a table
# wrong: clp_jax/nn/mlp.py:3: imports jax.shard_map: sharding is a table
# wrong: clp_jax/nn/mlp.py:5: uses jax.shard_map: sharding is a table
