"""The wheel, built and installed elsewhere: everything inside, nothing of ours beside `clp_jax`, and light to start."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED_AS = {
    "clp_jax": "clp_jax",
    "gin_configs": "clp_jax/gin_configs",
    "tasks": "clp_jax/tasks",
    "launch": "clp_jax/launch",
}
NEEDED = ("pyproject.toml", "README.md", "LICENSE")

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "seqio", "grain", "numpy", "matplotlib", "scipy")
TRAINING = (
    "clp_jax.train",
    "clp_jax.evaluate",
    "clp_jax.report",
    "clp_jax.sample",
    "clp_jax.experiment",
    "clp_jax.training.supervised",
    "clp_jax.training.reward_models",
    "clp_jax.training.clp",
    "clp_jax.training.policies",
    "clp_jax.rewards.programmatic",
    "clp_jax.data.reader",
    # What the reader imports when it reads.
    "grain.sources",
    "grain.experimental",
)


def run(*command: str, cwd: Path, path: Path) -> str:
    """Output of a command that finds `clp_jax` in `path` and nowhere else."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed_files() -> dict[str, Path]:
    """What a wheel should hold, by its path there: all sources and gin files of the checkout."""
    files = {}
    for folder, where in INSTALLED_AS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".gin", ".yaml") or path.name == "constraints.txt":
                files[f"{where}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the checkout's product, with no network."""
    copy = tmp_path_factory.mktemp("checkout")
    sources = [ROOT / name for name in NEEDED] + list(installed_files().values())
    for path in sources:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", ".", cwd=copy, path=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=wheel.parent, path=target)
    return target


def test_pyproject_lists_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {where.replace("/", "."): folder for folder, where in INSTALLED_AS.items()}
    folders = {name.rpartition("/")[0].replace("/", ".") for name in installed_files()}
    assert sorted(settings["packages"]) == sorted({"clp_jax.gin_configs", *folders})


def test_installed_it_brings_workers_what_a_checkout_does(site, tmp_path):
    script = "from clp_jax.launch.code import archive; open('code.tar.gz', 'wb').write(archive({}, 'tpu'))"
    run(sys.executable, "-c", script, cwd=tmp_path, path=site)
    with tarfile.open(tmp_path / "code.tar.gz") as brought:
        names = set(brought.getnames())
        assert brought.extractfile("constraints.txt").read() == (ROOT / "constraints.txt").read_bytes()
    assert set(installed_files()) < names


def test_every_folder_of_sources_is_a_package():
    files = installed_files()
    folders = {name.rpartition("/")[0] for name in files if name.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= set(files)


def test_the_wheel_holds_all_sources_and_gin_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == set(installed_files())
        assert {name.split("/")[0] for name in names} == {"clp_jax"}
        for name, path in installed_files().items():
            assert archive.read(name) == path.read_bytes(), name
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
        assert len(licenses) == 1


def test_installed_it_answers_from_anywhere(site, tmp_path):
    script = "import clp_jax.tasks, clp_jax.launch as l; print(clp_jax.__file__, clp_jax.tasks.__file__, l.__file__)"
    for file in run(sys.executable, "-c", script, cwd=tmp_path, path=site).split():
        assert Path(file).is_relative_to(site)
    overview = run(sys.executable, str(site / "bin" / "clp"), "--help", cwd=tmp_path, path=site)
    for command in ("prepare", "train", "evaluate", "report", "sample", "experiment"):
        assert f"\n  {command} " in overview
    words = ("train", "--gin_file=examples/pydoc_sft.gin", "--help")
    told = run(sys.executable, str(site / "bin" / "clp"), *words, cwd=tmp_path, path=site)
    assert "examples/pydoc_sft.gin: " in told


def test_installed_it_resolves_shipped_gin_files(site, tmp_path):
    words = ("train", "--gin_file=examples/pydoc_sft.gin", "--print_config")
    text = run(sys.executable, str(site / "bin" / "clp"), *words, cwd=tmp_path, path=site)
    golden = (Path(__file__).parent / "golden" / "examples_pydoc_sft.gin").read_text()
    assert text == golden
    assert list(tmp_path.iterdir()) == []


def loaded(script: str, names: tuple[str, ...], cwd: Path) -> list[str]:
    """Which of the packages are loaded when a fresh process has run a script."""
    asked = f"import sys\n{script}\nprint('LOADED', *sorted(sys.modules.keys() & {set(names)!r}))"
    return run(sys.executable, "-c", asked, cwd=cwd, path=ROOT).rpartition("LOADED")[2].split()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["train", "--no_such_flag"]])
def test_help_and_slips_import_nothing_heavy(words, tmp_path):
    assert loaded(f"from clp_jax.main import main\nmain({words!r})", HEAVY, tmp_path) == []


def test_training_starts_without_tensorflow(tmp_path):
    script = f"import importlib\nfor name in {TRAINING!r}: importlib.import_module(name)"
    assert loaded(script, ("tensorflow", "seqio", "tensorflow_datasets", "jax", "torch", "gin"), tmp_path) == ["jax"]
