"""The script that XManager runs: an experiment with one work unit for each trial. It needs `xmanager` and nothing of ours.

A launch copies this file and writes `experiment.json` next to it, which has all that a person gave: nothing that was typed is
ever code. What is known of a work unit is in its folder: `claimed` when it may not begin again, `work_unit.json` with its
number in XManager, `log`, and `exit` when it is over.
"""

import asyncio
import json
import re
import shutil
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What XManager's tables hold of a text.
LONGEST = 255
# Where Vertex does not say the exit code of a program that failed, it may do better: as if it had got SIGKILL.
LOST = 137


def requirements(settings):
    """What a work unit needs, as `xm.JobRequirements`: amounts by the names that XManager has."""
    from xmanager import xm

    units = {"ram": xm.GiB, "tmp_ram": xm.GiB, "disk": xm.GiB}
    return xm.JobRequirements(**{name: amount * units.get(name.lower(), 1) for name, amount in settings.items()})


def package(experiment, settings):
    """The executable: bash of this machine, or an image."""
    from xmanager import xm, xm_local

    if settings["executor"] == "local":
        what, where = xm.Binary(path=shutil.which("bash")), xm_local.Local.Spec()
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


def arguments(words, parameters):
    """The words of a work unit; its hyper-parameters are arguments by name, which XManager shows as those of the work unit."""
    from xmanager import xm

    found = xm.SequentialArgs()
    for word in words:
        named = re.fullmatch(r"--((?:gin\.)?([^=\s]+))=(.*)", word, flags=re.DOTALL)
        is_alone = named and sum(other.startswith(f"--{named[1]}=") for other in words) == 1
        found = xm.merge_args(found, {named[1]: named[3]} if is_alone and named[2] in parameters else [word])
    return found


def note(experiment_id, number, trial, settings):
    """Adds a work unit with its hyper-parameters to XManager's table of jobs, where it has jobs of other machines by itself."""
    import sqlalchemy
    from google.protobuf import text_format
    from xmanager.generated import data_pb2
    from xmanager.xm_local.storage import database

    data = ""
    if settings["executor"] == "local":
        told = data_pb2.LocalJob(cmd=trial["name"], timestamp=int(time.time() * 1000))
        data = text_format.MessageToString(data_pb2.Job(local=told))
    named = " ".join(f"{name}={value}" for name, value in trial["parameters"].items()) or trial["name"]
    row = {"experiment": experiment_id, "unit": number, "name": named[:LONGEST], "data": data[:LONGEST]}
    insert = (
        "INSERT INTO job (experiment_id, work_unit_id, job_name, job_data) VALUES (:experiment, :unit, :name, :data)"
    )
    with database.database().engine.begin() as connection:
        connection.execute(sqlalchemy.text(insert), row)


def write(path, text):
    """Writes a file, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


async def begin(experiment, executable, trial, settings):
    """Adds a work unit, which begins, and writes down where it is."""
    from xmanager import xm

    here = Path(trial["unit"])
    local = [str(HERE / "unit.sh"), str(here / "run.sh")] if settings["executor"] == "local" else []
    job = xm.Job(
        name=trial["name"],
        executable=executable,
        executor=executor(settings),
        args=xm.merge_args(local, arguments(trial["words"], trial["parameters"])),
    )
    unit = await experiment.add(job)
    write(
        here / "work_unit.json",
        json.dumps({"experiment": experiment.experiment_id, "work_unit": unit.work_unit_id}) + "\n",
    )
    try:
        note(experiment.experiment_id, unit.work_unit_id, trial, settings)
    except Exception as error:
        # They are for people to read: it runs all the same.
        print(f"XManager's tables do not take the hyper-parameters: {error}", flush=True)
    parameters = json.dumps(trial["parameters"])
    print(f"work unit {unit.work_unit_id} of experiment {experiment.experiment_id}: {parameters}", flush=True)
    return unit


async def follow(experiment, executable, trial, settings):
    """Runs a work unit to its end; a local one leaves its own exit code."""
    here, code = Path(trial["unit"]), 0
    try:
        unit = await begin(experiment, executable, trial, settings)
        await unit.wait_until_complete()
    except Exception as error:
        # The others go on.
        print(f"{trial['name']}: {error}", flush=True)
        told = re.search(r"non-zero status of (\d+)", str(error))
        code = int(told[1]) if told else LOST
    if settings["executor"] != "local":
        write(here / "exit", f"{code}\n")


def claim(trial, settings):
    """Whether a work unit may begin: one that was stopped before may not."""
    place = Path(trial["unit"]) / "claimed"
    if settings["executor"] == "local":
        return not place.is_dir()  # Its own script takes it.
    try:
        place.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


async def run(settings):
    """Runs all trials, so many at once, and waits for them.

    Args:
        settings: of `experiment.json`: title, executor, image, requirements, most, and the trials' names, folders, words and
            parameters.
    """
    from xmanager import xm_local

    free, is_over = asyncio.Semaphore(settings["most"]), False
    try:
        async with xm_local.create_experiment(experiment_title=settings["title"][:LONGEST]) as experiment:
            executable, tasks = package(experiment, settings), []
            for trial in settings["trials"]:
                await free.acquire()
                if not claim(trial, settings):
                    free.release()
                    continue
                task = asyncio.create_task(follow(experiment, executable, trial, settings))
                task.add_done_callback(lambda _: free.release())
                tasks.append(task)
            await asyncio.gather(*tasks)
            is_over = True
    except Exception as error:
        # When the experiment is left, XManager tells of failed programs once more.
        if not is_over:
            raise
        print(error, flush=True)


def stop(here):
    """Ends a work unit of another machine, by what XManager's tables have of it."""
    from xmanager.cloud import vertex
    from xmanager.xm_local.storage import database

    told = json.loads((here / "work_unit.json").read_text())
    for job in database.database().get_work_unit(told["experiment"], told["work_unit"]).jobs.values():
        if job.HasField("caip"):
            vertex.get_default_client().cancel(job.caip.resource_name)


def main(words):
    """What `absl.app` runs: the experiment, or the end of one work unit."""
    if words[1:2] == ["stop"]:
        stop(Path(words[2]))
    else:
        asyncio.run(run(json.loads((HERE / "experiment.json").read_text())))


if __name__ == "__main__":
    from absl import app

    app.run(main)
