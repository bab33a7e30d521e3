# at: tasks/mine.py
from clp_jax.models.config import T5Config
# at: launch/pod.py
from clp_jax.data import batch
# at: clp_jax/prepare.py
from clp_jax.tasks import pydoc
import tasks.pydoc
# wrong: tasks/mine.py:1: imports clp_jax.models.config: tasks know clp_jax.data only
# wrong: launch/pod.py:1: imports clp_jax.data.batch: launch imports nothing of clp_jax
# wrong: clp_jax/prepare.py:1: imports clp_jax.tasks.pydoc: nothing imports tasks
# wrong: clp_jax/prepare.py:2: imports tasks.pydoc: no such module once installed: it is clp_jax.tasks
