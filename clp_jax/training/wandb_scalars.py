"""Metrics to Weights & Biases, where it is installed and asked for; who one is there is the `wandb` command's business."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbScalars:
    """One run of a project at W&B: the same one when training goes on in the same directory.

    Args:
        project: its name there.
        run_dir: names the run.
        config_text: the resolved configuration.

    Raises:
        RuntimeError: when wandb is not installed.
    """

    def __init__(self, project: str, run_dir: Path, config_text: str):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                f"wandb_project is {project!r}, but wandb can't be imported ({error}): pip install 'clp-jax[wandb]', or leave "
                "it out."
            ) from error
        place = run_dir.resolve()
        self._run: Any = wandb.init(
            project=project,
            name=place.name,
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(place),
            config={"gin": config_text},
        )

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Adds the numbers of a step."""
        self._run.log(dict(values), step=step, commit=True)  # Otherwise it waits for the next step.

    def close(self) -> None:
        """Ends, when all is sent."""
        self._run.finish()
