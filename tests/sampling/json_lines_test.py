"""Lines in and out: what is read, what is refused with its number, and the order of answers."""

import io
import json

import numpy as np
import pytest
import sentencepiece  # noqa: F401 - the vocabulary needs it.

from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.sampling.json_lines import Answers, Limits, Line, answers, batches, pad_rows, read_lines


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_vocabulary(["the quick brown fox jumps over the lazy dog"] * 3, 31, path)
    return Vocabulary(path)


def read(tmp_path, vocabulary, *lines: bytes, with_targets: bool = True, **limits) -> list[Line]:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    sizes = dict(vocab_size=31, inputs=8, targets=6, pad_id=0) | limits
    return read_lines(tmp_path / "in.jsonl", vocabulary, Limits(**sizes), with_targets=with_targets)


def test_texts_become_what_the_policy_reads_and_lists_stay(tmp_path, vocabulary):
    text, ids = read(
        tmp_path,
        vocabulary,
        b'{"inputs": "fox", "targets": "dog", "id": 7}',
        b"",
        b'{"inputs": [3, 1], "targets": [4]}',
    )
    assert text.inputs == (*vocabulary.encode("fox"), 1) and text.targets == (*vocabulary.encode("dog"), 1)
    assert (text.number, text.given) == (1, {"inputs": "fox", "targets": "dog"})
    assert (ids.number, ids.inputs, ids.targets) == (3, (3, 1), (4,))


def test_targets_may_be_left_out(tmp_path, vocabulary):
    (line,) = read(tmp_path, vocabulary, b'{"inputs": [3], "targets": "ignored"}', with_targets=False)
    assert line.targets is None and line.given == {"inputs": [3]}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"not json", "line 2 was skipped: it is not JSON (expecting value at character 1): 'not json'"),
        (b"inputs: " + b"a" * 40, "it is not JSON (expecting value at character 1): 'inputs: " + "a" * 32 + "...'"),
        (
            b'{"inputs": "a", "targets": "b"',
            'it is not JSON (expecting \',\' delimiter at character 31): \'{"inputs": "a"',
        ),
        (b"[" * 100_000, "it is not JSON that can be read (nested too deep): '[[["),
        (b'["a"]', "it is not a JSON object"),
        (b'{"targets": "a"}', "it has no 'inputs'"),
        (b'{"inputs": "a"}', "it has no 'targets'"),
        (b'{"inputs": " ", "targets": "a"}', "the prompt is empty"),
        (b'{"inputs": [], "targets": "a"}', "inputs is empty"),
        (b'{"inputs": 3, "targets": "a"}', "inputs is 3: expected text, or a list of token ids"),
        (b'{"inputs": [3, 31], "targets": "a"}', "token id 31, which is outside the vocabulary of 31"),
        (b'{"inputs": [3, -1], "targets": "a"}', "token id -1, which is outside"),
        (b'{"inputs": [3, 0], "targets": "a"}', "token id 0, which is padding"),
        (b'{"inputs": [3, true], "targets": "a"}', "expected text, or a list of token ids"),
        (b'{"inputs": [3], "targets": [3, 3, 3, 3, 3, 3, 3]}', "targets has 7 tokens: expected at most 6"),
        (b'{"inputs": [3, 3, 3, 3, 3, 3, 3, 3, 3], "targets": [3]}', "inputs has 9 tokens: expected at most 8"),
        (b'{"inputs": "caf\xe9", "targets": "a"}', 'line 2 was skipped: it is not UTF-8 at byte 16: \'{"inputs": "caf'),
    ],
)
def test_a_bad_line_is_named_and_the_rest_go_on(tmp_path, vocabulary, bad, says, capsys):
    good = b'{"inputs": [3], "targets": [4]}'
    assert [line.number for line in read(tmp_path, vocabulary, good, bad, good)] == [1, 3]
    assert says in capsys.readouterr().err


def test_a_long_text_is_cut_with_a_warning(tmp_path, vocabulary, capsys):
    (line,) = read(tmp_path, vocabulary, b'{"inputs": "the quick brown fox", "targets": [4]}', inputs=3)
    assert len(line.inputs) == 3 and "line 1: the prompt was cut to 3 tokens" in capsys.readouterr().err


def test_a_file_without_a_good_line(tmp_path, vocabulary):
    with pytest.raises(
        ValueError, match='in.jsonl has no good line: expected one JSON object a line, with "inputs" and'
    ):
        read(tmp_path, vocabulary, b"{}")


def line(number: int, inputs: int, targets: int = 1) -> Line:
    return Line(number, {"inputs": number}, (3,) * inputs, (4,) * targets)


def test_batches_are_of_like_lengths_and_hold_every_line_once():
    lines = [line(i, inputs=1 + 13 * i, targets=1 + 40 * (i % 2)) for i in range(9)]
    found = list(batches(lines, 2))
    assert sorted(one.number for batch in found for one in batch) == list(range(9))
    assert max(map(len, found)) == 2
    for batch in found:
        arrays = pad_rows([one.inputs for one in batch], 2, 0)
        assert all(len(one.inputs) > arrays.shape[1] // 2 or arrays.shape[1] == 32 for one in batch)


def test_rows_are_padded_and_repeated():
    rows = pad_rows([(5, 6), (7,)], 3, -1)
    assert rows.shape == (3, 32)
    np.testing.assert_array_equal(rows[:, :3], [[5, 6, -1], [7, -1, -1], [7, -1, -1]])


def test_answers_keep_the_order_of_the_lines():
    file = io.StringIO()
    out = Answers(file)
    lines = [line(number, 1) for number in (2, 5, 9)]
    out.expect(lines)
    out.put(lines[1], {"x": 1})
    assert file.getvalue() == ""
    out.put(lines[0], {"x": 0})
    out.put(lines[2], {"x": 2})
    written = [json.loads(row) for row in file.getvalue().splitlines()]
    assert written == [{"line": n, "inputs": n, "x": i} for i, n in enumerate((2, 5, 9))]


def test_an_output_is_never_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError), answers(tmp_path / "out.jsonl"):
        pass
    assert (tmp_path / "out.jsonl").read_text() == "mine"
