"""Lines in and out: what is read, what is refused with its number, and the order of answers."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece  # noqa: F401 - the vocabulary needs it.
from tiny_tokenizers import huggingface_directory, sentencepiece_directory

from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.sampling.json_lines import Answers, Limits, Line, Skipped, answers, batches, pad_rows, read_lines


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_vocabulary(["the quick brown fox jumps over the lazy dog"] * 3, 31, path)
    return Vocabulary(path)


def read(tmp_path, vocabulary, *lines: bytes, with_targets: bool = True, **limits) -> list[Line]:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    sizes = dict(vocab_size=31, inputs=8, targets=6, pad_id=0) | limits
    source = tmp_path / "in.jsonl"
    return read_lines(source, vocabulary, Limits(**sizes), Skipped(source), with_targets=with_targets)


def test_texts_become_what_the_policy_reads_and_lists_stay(tmp_path, vocabulary):
    text, ids = read(
        tmp_path,
        vocabulary,
        b'{"inputs": "fox", "targets": "dog", "id": 7}',
        b"",
        b'{"inputs": [3, 1], "targets": [4]}',
    )
    assert text.inputs == (*vocabulary.encode("fox"), 1) and text.targets == (*vocabulary.encode("dog"), 1)
    assert (text.number, text.given) == (1, {"inputs": "fox", "targets": "dog", "id": 7})
    assert (ids.number, ids.inputs, ids.targets) == (3, (3, 1), (4,))


def test_targets_may_be_left_out(tmp_path, vocabulary):
    (line,) = read(tmp_path, vocabulary, b'{"inputs": [3], "targets": "ignored"}', with_targets=False)
    assert line.targets is None and line.given == {"inputs": [3], "targets": "ignored"}


def test_a_line_may_bring_its_seed(tmp_path, vocabulary, capsys):
    lines = [
        b'{"inputs": [3], "seed": %s}' % seed for seed in (b"0", b"4294967295", b"null", b"4294967296", b"-1", b"1.0")
    ]
    found = read(tmp_path, vocabulary, *lines, b'{"inputs": [3]}', with_targets=False)
    assert [(line.number, line.seed) for line in found] == [(1, 0), (2, 2**32 - 1), (3, None), (7, None)]
    assert "line 6 was skipped: seed is 1.0: expected a whole number in [0, 2**32)" in capsys.readouterr().err
    (scored,) = read(tmp_path, vocabulary, b'{"inputs": [3], "targets": [4], "seed": "none of ours"}')
    assert scored.seed is None


WISHES = dict(with_targets=False, completion=(2, 9))


def test_a_line_may_say_how_it_is_completed(tmp_path, vocabulary, capsys):
    found = read(
        tmp_path,
        vocabulary,
        b'{"inputs": [3], "num_samples": 4, "max_tokens": 9, "stop": "END"}',
        b'{"inputs": [3], "max_tokens": 2, "stop": ["a b", [5, 30], "c"], "id": 1}',
        b'{"inputs": [3], "num_samples": null, "max_tokens": null, "stop": null, "temperature": "mine"}',
        b'{"inputs": [3], "stop": []}',
        **WISHES,
    )
    assert [(line.num_samples, line.max_tokens, line.stop) for line in found] == [
        (4, 9, ("END",)),
        (None, 2, ("a b", (5, 30), "c")),
        (None, None, ()),
        (None, None, ()),
    ]
    assert found[1].given["id"] == 1 and found[2].given["temperature"] == "mine"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (b'"num_samples": 0', "num_samples is 0: expected a whole number in [1, 65536]"),
        (b'"num_samples": 65537', "num_samples is 65537: expected a whole number in [1, 65536]"),
        (b'"num_samples": true', "num_samples is true: expected a whole number"),
        (b'"max_tokens": 10', "max_tokens is 10: expected a whole number in [2, 9], from --min_tokens to --max_tokens"),
        (b'"max_tokens": 1', "max_tokens is 1: expected a whole number in [2, 9]"),
        (b'"max_tokens": "5"', 'max_tokens is "5": expected a whole number in [2, 9]'),
        (b'"stop": 5', "stop is 5: expected a text, or a list of texts and lists of token ids"),
        (b'"stop": {"a": 1}', 'stop is {"a": 1}: expected a text'),
        (b'"stop": [5, 6]', "stop has 5: expected texts and lists of token ids, none empty"),
        (b'"stop": ""', 'stop has "": expected texts and lists of token ids, none empty'),
        (b'"stop": ["a", []]', "stop has []: expected texts"),
        (b'"stop": [[5, "a"]]', 'stop has [5, "a"]: expected texts'),
        (b'"stop": [[5, true]]', "stop has [5, true]: expected texts"),
        (b'"stop": [[31]]', "stop has the token id 31, which is outside the vocabulary of 31"),
        (b'"stop": [[-1]]', "stop has the token id -1, which is outside the vocabulary of 31"),
    ],
)
def test_wishes_that_can_not_be_granted_are_bad_lines(tmp_path, vocabulary, own, says, capsys):
    good = b'{"inputs": [3]}'
    assert [line.number for line in read(tmp_path, vocabulary, good, b'{"inputs": [3], %s}' % own, **WISHES)] == [1]
    assert f"line 2 was skipped: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("own", [b'"num_samples": 2', b'"max_tokens": 3', b'"stop": "a"'])
def test_a_search_completes_all_lines_alike_and_scores_ask_for_nothing(tmp_path, vocabulary, own, capsys):
    lines = b'{"inputs": [3], "targets": [4]}', b'{"inputs": [3], "targets": [4], %s}' % own
    assert [line.number for line in read(tmp_path, vocabulary, *lines, with_targets=False)] == [1]
    name = own.split(b'"')[1].decode()
    expected = f"line 2 was skipped: it has {name}, but a search completes all lines alike: give flags, or leave it out"
    assert expected in capsys.readouterr().err
    assert [line.number for line in read(tmp_path, vocabulary, *lines)] == [1, 2]


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
        (b'{"inputs": [3], "targets": [4], "id": NaN}', "it has the number NaN: expected finite ones"),
        (b'{"inputs": [3], "targets": [4], "id": -1e999}', "it has the number -1e999: expected finite ones"),
        (b'{"inputs": "caf\xe9", "targets": "a"}', 'line 2 was skipped: it is not UTF-8 at byte 16: \'{"inputs": "caf'),
    ],
)
def test_a_bad_line_is_named_and_the_rest_go_on(tmp_path, vocabulary, bad, says, capsys):
    good = b'{"inputs": [3], "targets": [4]}'
    assert [line.number for line in read(tmp_path, vocabulary, good, bad, good)] == [1, 3]
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["fox<pad>", "<pad>fox", "quick<pad>fox", "fox<pad><pad>"])
@pytest.mark.parametrize("with_targets", [True, False])
def test_texts_with_padding_are_bad_lines(tmp_path, text, with_targets, capsys):
    ours = Vocabulary(huggingface_directory(tmp_path / "t5", "t5"))
    lines = [json.dumps({"inputs": inputs, "targets": "dog"}).encode() for inputs in ("fox", text, "dog")]
    found = read(tmp_path, ours, *lines, with_targets=with_targets, vocab_size=128, inputs=90, targets=60)
    assert [(line.number, line.inputs) for line in found] == [
        (1, (*ours.encode("fox"), 1)),
        (3, (*ours.encode("dog"), 1)),
    ]
    assert "line 2 was skipped: inputs has the token id 0, which is padding" in capsys.readouterr().err


def test_tokens_of_texts_are_of_the_vocabulary(tmp_path, vocabulary, capsys):
    highest = max(vocabulary.encode("fox"))
    lines = [
        b'{"inputs": "fox", "targets": [3]}',
        b'{"inputs": [3], "targets": "fox"}',
        b'{"inputs": [3], "targets": [3]}',
    ]
    assert [line.number for line in read(tmp_path, vocabulary, *lines, vocab_size=highest)] == [3]
    said = capsys.readouterr().err
    for number, name in ((1, "inputs"), (2, "targets")):
        assert f"line {number} was skipped: {name} has the token id {highest}, which is outside the vocabulary" in said


def test_a_long_text_is_cut_before_its_end_with_a_warning(tmp_path, vocabulary, capsys):
    text = "the quick brown fox"
    (line,) = read(tmp_path, vocabulary, json.dumps({"inputs": text, "targets": [4]}).encode(), inputs=3)
    assert line.inputs == (*vocabulary.encode(text)[:2], 1)
    assert "line 1: the prompt was cut to 3 tokens" in capsys.readouterr().err


def test_long_texts_of_decoders_are_bad_lines(tmp_path, capsys):
    ours = Vocabulary(sentencepiece_directory(tmp_path / "llama", "llama"))
    long, short = (json.dumps({"inputs": text}).encode() for text in ("the quick brown fox", "fox"))
    limit, length = len(ours.encode_prompt("fox")), len(ours.encode_prompt("the quick brown fox"))
    assert length > limit
    (line,) = read(tmp_path, ours, long, short, with_targets=False, vocab_size=340, inputs=limit, pad_id=-1)
    assert (line.number, line.inputs) == (2, tuple(ours.encode_prompt("fox")))
    expected = f"the prompt has {length} tokens: expected at most {limit}; give a greater --max_prompt, or cut it."
    assert f"line 1 was skipped: {expected}" in capsys.readouterr().err


def test_a_file_without_a_good_line(tmp_path, vocabulary):
    with pytest.raises(
        ValueError, match='in.jsonl has no good line: expected one JSON object a line, with "inputs" and'
    ):
        read(tmp_path, vocabulary, b"{}")


def test_a_directory_is_no_input(tmp_path, vocabulary):
    with pytest.raises(ValueError, match="is a directory: expected a file of JSON lines"):
        read_lines(tmp_path, vocabulary, Limits(31, 8, 6, 0), Skipped(tmp_path), with_targets=True)


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
    out = Answers(file, Skipped(Path("in.jsonl")))
    lines = [line(number, 1) for number in (2, 5, 9)]
    out.expect(lines)
    out.put(lines[1], {"x": 1})
    assert file.getvalue() == ""
    out.put(lines[0], {"x": 0})
    out.put(lines[2], {"x": 2})
    written = [json.loads(row) for row in file.getvalue().splitlines()]
    assert written == [{"line": n, "inputs": n, "x": i} for i, n in enumerate((2, 5, 9))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_not_finite_is_reported(bad, capsys):
    file, skipped = io.StringIO(), Skipped(Path("in.jsonl"))
    out = Answers(file, skipped)
    lines = [line(number, 1) for number in (2, 5, 9)]
    out.expect(lines)
    for one, value in zip(lines, (0.0, bad, 2.0), strict=True):
        out.put(one, {"logprobs": [value]})
    assert [json.loads(row)["line"] for row in file.getvalue().splitlines()] == [2, 9]
    assert "in.jsonl, line 5 was skipped: what was found is not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        skipped.finish()
    assert stop.value.code == 1
    assert "in.jsonl: 1 line was skipped; the others have their answers" in capsys.readouterr().err


def test_without_skipped_lines_all_is_well(capsys):
    Skipped(Path("in.jsonl")).finish()
    assert capsys.readouterr().err == ""


def test_what_a_line_has_is_kept_up_to_parts_of_the_answer():
    file = io.StringIO()
    out = Answers(file, Skipped(Path("in.jsonl")))
    one = Line(4, {"id": "x", "line": 77, "text": "old", "inputs": [3]}, (3,), None)
    out.expect([one])
    out.put(one, {"text": "new"})
    assert file.getvalue() == '{"line": 4, "id": "x", "text": "new", "inputs": [3]}\n'


def test_an_output_is_never_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError), answers(tmp_path / "out.jsonl", Skipped(tmp_path)):
        pass
    assert (tmp_path / "out.jsonl").read_text() == "mine"
