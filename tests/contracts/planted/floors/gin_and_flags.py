# at: clp_jax/training/loop.py
import gin
from absl import flags
# at: clp_jax/train.py
from gin import configurable
from absl import app
# wrong: clp_jax/training/loop.py:1: imports gin: gin belongs to the command line
# wrong: clp_jax/training/loop.py:2: imports absl.flags: flags belong to the command line
# wrong: clp_jax/train.py:1: imports gin.configurable: gin belongs to the command line
# wrong: clp_jax/train.py:2: imports absl.app: flags belong to the command line
