"""`clp prepare`: a SeqIO task or mixture becomes token ids on disk."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from clp_jax.data.manifest import FILE_NAME, Manifest
from clp_jax.data.prepare import Request, materialise
from clp_jax.data.text_task import TextTask


def prepare(
    *,
    task: TextTask,
    output_dir: str,
    lengths: Mapping[str, int],
    vocabulary_size: int = 4096,
    vocabulary: str | None = None,
    splits: Sequence[str] = ("train", "validation", "test"),
    pack: bool = False,
) -> Manifest:
    """Materialises a SeqIO task or mixture into ArrayRecord shards with a manifest.

    A directory that the same request prepared before is checked and left as it is.

    Args:
        task: what to prepare: docstrings (`clp_jax.tasks.pydoc.Pydoc`), JSON lines (`clp_jax.tasks.jsonl.Jsonl`), or a
            SeqIO task or mixture that modules register (`clp_jax.data.text_task.Registered`).
        output_dir: where the data goes; new, or prepared by the same request.
        lengths: tokens of a row for ``inputs`` and ``targets``, the end of sequence included.
        vocabulary_size: tokens of the SentencePiece vocabulary trained on the first split.
        vocabulary: a SentencePiece model file, or a directory of Hugging Face's with a tokenizer, to use instead of training
            one.
        splits: to prepare.
        pack: put several short examples into one row; for supervised training only.

    Returns:
        The manifest.

    Raises:
        ValueError: for an unknown task, a split without examples, or a directory that holds something else.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    request = Request(
        task=task,
        lengths=dict(lengths),
        vocabulary_size=vocabulary_size,
        vocabulary=vocabulary,
        splits=tuple(splits),
        pack=pack,
    )
    there = (Path(output_dir) / FILE_NAME).is_file()
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None, speed="")

        def show(what: str, done: int, total: int | None) -> None:
            if what != bar.tasks[line].description:
                bar.reset(line, description=what, total=total, speed="")
            speed = bar.tasks[line].speed
            bar.update(line, completed=done, speed="" if speed is None else f"{speed:,.0f} examples/s")

        manifest = materialise(request, Path(output_dir), show)
    _print(manifest, console)
    what = "is prepared already" if there else f"prepared in {time.monotonic() - started:.0f} s"
    console.print(f"{output_dir}: {what}, fingerprint {manifest.fingerprint[:12]}")
    return manifest


def _print(manifest: Manifest, console: Console) -> None:
    table = Table(title=f"{manifest.task}: {manifest.vocabulary_size} tokens in the vocabulary")
    for column in ("split", "examples", "rows", "feature", "mean tokens", "90 %", "maximum", "truncated"):
        table.add_column(column, justify="left" if column in ("split", "feature") else "right")
    for name, split in manifest.splits.items():
        for feature, s in split.statistics.items():
            cells = (f"{s['mean']:.1f}", f"{s['p90']:.0f}", f"{s['max']:.0f}", f"{s['truncated']:.1%}")
            table.add_row(name, f"{split.examples:,}", f"{split.records:,}", feature, *cells)
    console.print(table)
