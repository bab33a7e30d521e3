"""The page holds all it shows, refers to nothing outside, and shows what models write as text."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from sweeps import make_sweep

from clp_jax.evaluation.report import write_report
from clp_jax.evaluation.sweep import Example
from clp_jax.report import report

METRICS = [{"step": s, "kl": 0.1 * s, "objective": -1.0 / s, "reward/brief": 0.2 * s} for s in range(1, 5)]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page; complains about tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.addresses, self.text, self._open = [], [], "", []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained(tmp_path):
    path = write_report([make_sweep(), make_sweep(method="soups", seed=1)], METRICS, tmp_path / "new" / "report")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert path.name == "index.html" and page.tags.count("img") == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^']*'", "", source))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name in ("front_faithful_brief", "grid", "training"):
        assert (path.parent / f"{name}.png").read_bytes().startswith(PNG)


def test_the_page_shows_every_figure(tmp_path):
    sweeps = [make_sweep(), make_sweep(method="soups", seed=1)]
    page = Page(write_report(sweeps, [], tmp_path).read_text())
    assert "training.png" not in {p.name for p in tmp_path.iterdir()}
    for sweep in sweeps:
        assert sweep.method in page.text and f"{sweep.hypervolume:.3f}" in page.text
    for point in sweeps[0].points:
        for name, interval in point.rewards.items():
            assert f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]" in page.text
            assert f"{point.raw_rewards[name]:.3f}" in page.text
    assert page.text.count("●") == sum(p.non_dominated for p in sweeps[0].points)
    assert "completion 2 at 0.75" in page.text and "third" in page.text


def test_what_models_write_is_text(tmp_path):
    evil = "<script>alert(1)</script><img src='http://example.com/x.png'> & \"quoted\""
    sweep = make_sweep(method="<b>m</b>", names=("a<i>", "b&c"))
    sweep = dataclasses.replace(sweep, examples=(Example(evil, evil + "r", (evil,) * len(sweep.points)),))
    page = Page(write_report([sweep], METRICS, tmp_path).read_text())
    assert page.text.count(evil) == 2 + len(sweep.points)
    assert not {"script", "b", "i"} & set(page.tags)
    assert "<b>m</b>" in page.text and "a<i>" in page.text and "b&c" in page.text


def test_names_of_rewards_may_hold_anything(tmp_path):
    """Plots are files: a name with a slash is not a directory, and one with dollars is not a formula."""
    write_report([make_sweep(names=("a/b", "$x_$ {"), method="_$m^$")], METRICS, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".html"} and all(p.is_file() for p in tmp_path.iterdir())


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("my page")
    with pytest.raises(ValueError, match="is not empty and not an earlier report: choose another output_dir"):
        write_report([make_sweep()], [], tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("index.html", "my page")]
    page = write_report([make_sweep()], [], tmp_path / "report")
    assert write_report([make_sweep()], [], tmp_path / "report") == page


def test_other_rewards_can_not_be_compared(tmp_path):
    with pytest.raises(ValueError, match="soups has the objectives a, b, full has faithful, brief"):
        write_report([make_sweep(), make_sweep(method="soups", names=("a", "b"))], [], tmp_path)


def test_the_command_reads_run_directories(tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        make_sweep(method=name).save(tmp_path / name / "results.json")
    (tmp_path / "first" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    path = report(run_dirs=[str(tmp_path / "first"), str(tmp_path / "second" / "results.json")])
    assert path == str(tmp_path / "first" / "report" / "index.html")
    assert (tmp_path / "first" / "report" / "training.png").is_file()
    printed = "".join(capsys.readouterr().out.split())
    assert "first:20prompts" in printed and path in printed and "firstdocument" in printed
    assert report(run_dirs=[str(tmp_path / "second")], output_dir=str(tmp_path / "x")) == str(tmp_path / "x/index.html")
    with pytest.raises(FileNotFoundError, match="run `clp evaluate` first"):
        report(run_dirs=[str(tmp_path)])
    with pytest.raises(ValueError, match="no run directories"):
        report(run_dirs=[])


def test_plots_are_drawn_the_same_again(tmp_path):
    for name in ("a", "b"):
        write_report([make_sweep()], METRICS, tmp_path / name)
    for image in (tmp_path / "a").glob("*.png"):
        np.testing.assert_array_equal(
            np.frombuffer(image.read_bytes(), np.uint8),
            np.frombuffer((tmp_path / "b" / image.name).read_bytes(), np.uint8),
        )
