"""The script that XManager runs: an experiment with one work unit for each trial. It needs `xmanager` and nothing of ours.

A launch copies this file and writes `experiment.json` next to it, which has all that a person gave: nothing that was typed is
ever code.
"""

import asyncio
import json
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def requirements(settings):
    """What a work unit needs, as `xm.JobRequirements`: amounts by the names that XManager has."""
    from xmanager import xm

    units = {"ram": xm.GiB, "tmp_ram": xm.GiB, "disk": xm.GiB}
    return xm.JobRequirements(**{name: amount * units.get(name.lower(), 1) for name, amount in settings.items()})


def package(experiment, settings):
    """The executable: a program of this machine, or an image."""
    from xmanager import xm, xm_local

    if settings["executor"] == "local":
        what, where = xm.Binary(path=str(HERE / "unit.sh")), xm_local.Local.Spec()
    else:
        what, where = xm.Container(image_path=settings["image"]), xm_local.Vertex.Spec()
    (executable,) = experiment.package([xm.Packageable(executable_spec=what, executor_spec=where)])
    return executable


def executor(settings):
    """Where work units run."""
    from xmanager import xm_local

    need = requirements(settings["requirements"])
    if settings["executor"] == "local":
        return xm_local.Local(requirements=need)
    return xm_local.Vertex(requirements=need)


async def run(settings):
    """Runs all trials and waits for them.

    Args:
        settings: of `experiment.json`: title, executor, image, requirements, and the trials' names, words and parameters.

    Returns:
        The numbers of the work units that failed.
    """
    from xmanager import xm, xm_local

    units, failed = {}, []
    async with xm_local.create_experiment(experiment_title=settings["title"]) as experiment:
        executable = package(experiment, settings)
        for number, trial in enumerate(settings["trials"], start=1):
            job = xm.Job(
                name=trial["name"],
                executable=executable,
                executor=executor(settings),
                args=xm.SequentialArgs.from_collection([*settings["command"], *trial["words"]]),
                env_vars={"CLP_WORK_UNIT": str(number)},
            )
            units[number] = await experiment.add(job, identity="")
            print(
                f"work unit {number} of experiment {experiment.experiment_id}: {json.dumps(trial['parameters'])}",
                flush=True,
            )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: [unit.stop() for unit in units.values()])
        for number, unit in units.items():
            try:
                await unit.wait_until_complete()
            except xm.ExperimentUnitError as error:
                print(f"work unit {number} failed: {error}", flush=True)
                failed.append(number)
    return failed


def main(arguments):
    """What `absl.app` runs."""
    try:
        failed = asyncio.run(run(json.loads((HERE / "experiment.json").read_text())))
    except RuntimeError as error:
        # The local executor tells of a failed program once more, when the experiment is left.
        print(error, flush=True)
        failed = [0]
    codes = [int(path.read_text()) for path in sorted(HERE.glob("unit-*.exit"))]
    # A mistake of the user is not tried again; what was lost, is.
    sys.exit(2 if 2 in codes else max([int(bool(failed)), *codes]))


if __name__ == "__main__":
    from absl import app

    app.run(main)
