"""The report: one HTML page that holds everything it shows, and the plots beside it as PNG."""

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clp_jax.evaluation.plots import plot_fronts, plot_grid, plot_training
from clp_jax.evaluation.statistics import Interval
from clp_jax.evaluation.sweep import Sweep

# By this a page is known to be a report, and may be written again.
_GENERATOR = "<meta name='generator' content='clp_jax report'>"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }
td.text, th.text { text-align: left; white-space: normal; }
img { max-width: 100%; background: white; border-radius: .4rem; }
blockquote { background: var(--soft); margin: .5rem 0; padding: .5rem 1rem; border-radius: .4rem; overflow-wrap: anywhere; }
small { opacity: .75; }
"""


def write_report(
    sweeps: Sequence[Sweep],
    metrics: Sequence[Mapping[str, Any]],
    output_dir: Path,
    intervals: str = "95 % bootstrap intervals over prompts",
) -> Path:
    """Writes ``index.html`` and PNG plots.

    Args:
        sweeps: the method first, then what it is compared with.
        metrics: lines of the first run's ``metrics.jsonl``; may be empty.
        output_dir: made where it is missing.
        intervals: what the sweeps' intervals are.

    Returns:
        The page.

    Raises:
        ValueError: when the sweeps have other objectives, or the directory holds something else than a report.
    """
    for sweep in sweeps[1:]:
        if sweep.objectives != sweeps[0].objectives:
            raise ValueError(
                f"{sweep.method} has the objectives {', '.join(sweep.objectives)}, {sweeps[0].method} has "
                f"{', '.join(sweeps[0].objectives)}: compare methods on the same rewards."
            )
    page = output_dir / "index.html"
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (page.is_file() and _GENERATOR in page.read_text()):
        raise ValueError(f"{output_dir} is not empty and not an earlier report: choose another output_dir.")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output_dir} can't be made ({error.strerror}): choose another output_dir.") from error
    figures = plot_fronts(sweeps) | {"grid": plot_grid(sweeps[0])}
    names = [f"reward/{n}" for n in sweeps[0].objectives] + ["objective", "kl", "length", "value_explained_variance"]
    training = plot_training(metrics, names)
    if training is not None:
        figures["training"] = training
    images = {name: _png(figure, output_dir / _file_name(name)) for name, figure in figures.items()}
    page.write_text(_page(sweeps, images, intervals), encoding="utf-8")
    return page


def _file_name(figure: str) -> str:
    # Names of rewards may hold slashes.
    return re.sub(r"[^\w.-]", "_", figure) + ".png"


def _png(figure: Figure, path: Path) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    path.write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def _page(sweeps: Sequence[Sweep], images: Mapping[str, str], intervals: str) -> str:
    sweep = sweeps[0]
    body = [
        f"<h1>{html.escape(sweep.method)}: one policy, every trade-off</h1>",
        f"<p>{sweep.num_prompts} test prompts, KL weight α = {sweep.alpha:g}. Rewards are in standard deviations of the "
        f"reference policy, 0 is its mean; brackets are {html.escape(intervals)}.</p>",
        *[_image(name, images[name]) for name in images if name.startswith("front_")],
        "<h2>Along the grid</h2>",
        _image("grid", images["grid"]),
        _points(sweep),
        "<h2>Figures</h2>",
        _summary(sweeps),
        "<h2>Examples</h2>",
        *[_example(sweep, index) for index in range(min(4, len(sweep.examples)))],
    ]
    if "training" in images:
        body += ["<h2>Training</h2>", _image("training", images["training"])]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"{_GENERATOR}"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(sweep.method)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _image(name: str, data: str) -> str:
    return f"<p><img alt='{html.escape(name, quote=True)}' src='data:image/png;base64,{data}'></p>"


def _cell(interval: Interval, digits: int = 2) -> str:
    mean = f"{interval.mean:.{digits}f}"
    if not math.isfinite(interval.high - interval.low):  # Of a single seed.
        return mean
    return f"{mean} <small>[{interval.low:.{digits}f}, {interval.high:.{digits}f}]</small>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def _points(sweep: Sweep) -> str:
    names = [html.escape(name) for name in sweep.objectives]
    header = [*[f"w {n}" for n in names], *names, *[f"{n} (raw)" for n in names], "KL", "tokens", "front"]
    rows = [
        [
            *[f"{w:.2f}" for w in p.weights],
            *[_cell(p.rewards[n]) for n in sweep.objectives],
            *[f"{p.raw_rewards[n]:.3f}" for n in sweep.objectives],
            _cell(p.kl),
            _cell(p.length, 1),
            "●" if p.non_dominated else "",
        ]
        for p in sweep.points
    ]
    return _table(header, rows)


def _summary(sweeps: Sequence[Sweep]) -> str:
    names = sweeps[0].objectives
    header = ["method", "hypervolume", "mean value", *[f"ρ {html.escape(n)}" for n in names]]
    header += [*[f"range {html.escape(n)}" for n in names], "model calls per token"]
    rows = [
        [
            html.escape(s.method),
            f"{s.hypervolume:.3f}",
            f"{s.mean_value:.3f}",
            *[f"{s.steerability[n].rank_correlation:+.2f}" for n in names],
            *[f"{s.steerability[n].range:.2f}" for n in names],
            str(s.decode_calls_per_token),
        ]
        for s in sweeps
    ]
    return _table(header, rows)


def _example(sweep: Sweep, index: int) -> str:
    example = sweep.examples[index]
    rows = "".join(
        f"<tr><td>{', '.join(f'{w:.2f}' for w in point.weights)}</td><td class='text'>{html.escape(text)}</td></tr>"
        for point, text in zip(sweep.points, example.completions, strict=True)
    )
    names = ", ".join(html.escape(name) for name in sweep.objectives)
    return (
        f"<blockquote>{html.escape(example.prompt)}</blockquote><p>Reference: <em>{html.escape(example.reference)}</em></p>"
        f"<div class='scroll'><table><tr><th>{names}</th><th class='text'>completion</th></tr>{rows}</table></div>"
    )
