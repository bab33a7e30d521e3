"""The vocabulary: the ids and texts of seqio's, trained to the same bytes every time."""

import re

import numpy as np
import pytest
import sentencepiece

from clp_jax.data.text_task import import_seqio
from clp_jax.data.vocabulary import EOS_ID, FILE_NAME, PAD_ID, UNK_ID, Vocabulary, train_vocabulary

TEXTS = [
    "the quick brown fox jumps over a lazy dog",
    "pack my box with five dozen jugs of liquid\nhow vexingly quick daft zebras jump",
    "Sphinx of black quartz, judge my vow! Returns 0 or 1 (2, 3); 45-67_89.",
]
SAMPLES = [
    *TEXTS,
    "",
    " ",
    "  two  spaces\tand a tab ",
    "unseen: éß漢字🙂",
    "THE QUICK",
    "ﬁ ligature",
    "a" * 200,
    "</s><pad><unk>",
]
SIZE = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / FILE_NAME
    train_vocabulary(TEXTS, SIZE, path)
    return path


@pytest.fixture(scope="module")
def pair(model):
    """Ours, and seqio's of the same file."""
    return Vocabulary(model), import_seqio().SentencePieceVocabulary(str(model))


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_ids_are_those_of_seqio(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == list(theirs.encode(text)) == theirs.encode_tf(text).numpy().tolist()
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode([*ids, EOS_ID, PAD_ID, 7]) == theirs.decode([*ids, EOS_ID, PAD_ID, 7]) == ours.decode(ids)


def test_special_ids_and_size_are_those_of_seqio(pair):
    ours, theirs = pair
    assert (theirs.pad_id, theirs.eos_id, theirs.unk_id) == (PAD_ID, EOS_ID, UNK_ID) == (0, 1, 2)
    assert ours.size == theirs.vocab_size == SIZE
    assert ours.encode("漢")[-1] == UNK_ID


def test_any_ids_decode_as_they_do_in_seqio(pair):
    ours, theirs = pair
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(1, SIZE, rng.integers(0, 12)).astype(np.int32)
        assert ours.decode(ids) == theirs.decode(ids.tolist())


def test_text_of_training_comes_back(pair):
    ours, _ = pair
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == " ".join(text.split())


def test_a_batch_is_its_rows(pair):
    ours, _ = pair
    rows = np.zeros((4, 9), np.int32)
    rows[0, :3] = [*ours.encode("the")[:1], EOS_ID, 5]
    rows[1, 4:8] = [9, 8, 7, EOS_ID]
    rows[3] = SIZE + 100  # What a model with more logits than the vocabulary has tokens may say.
    texts = ours.decode_batch(rows)
    assert texts == [ours.decode(row) for row in rows]
    assert texts[1] == ours.decode([9, 8, 7]) and texts[2] == texts[3] == ""
    assert ours.decode_batch(rows[:0]) == []


def test_training_is_deterministic(model, tmp_path):
    train_vocabulary(TEXTS, SIZE, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == model.read_bytes()
    train_vocabulary([*TEXTS, "quick quick quick quick zebras"], SIZE, tmp_path / "other")
    assert Vocabulary(tmp_path / "other").fingerprint != Vocabulary(model).fingerprint


def test_it_is_saved_and_loaded_with_a_directory(model, tmp_path):
    vocabulary = Vocabulary(model)
    assert vocabulary.save(tmp_path) == tmp_path / FILE_NAME
    loaded = Vocabulary.load(tmp_path)
    assert loaded.fingerprint == vocabulary.fingerprint == Vocabulary.load(model).fingerprint
    loaded.save(tmp_path)  # Onto itself.
    assert Vocabulary.load(tmp_path).fingerprint == vocabulary.fingerprint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no vocabulary at .*vocabulary.model: expected a prepared data directory"
    ):
        Vocabulary.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*absent"):
        Vocabulary.load(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"not a model"], ids=["empty", "text"])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / FILE_NAME} is not a SentencePiece model")):
        Vocabulary.load(tmp_path)


def test_a_model_without_an_end_is_refused(tmp_path):
    options = {"vocab_size": SIZE, "model_type": "unigram", "minloglevel": 2, "num_threads": 1, "eos_id": -1}
    with (tmp_path / "plain.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=file, **options)
    with pytest.raises(
        ValueError, match=r"plain\.model has no token that ends a text: expected one trained with eos_id"
    ):
        Vocabulary(tmp_path / "plain.model")


@pytest.mark.parametrize("texts", [[], ["", "  \n "]])
def test_no_text_is_an_error(texts, tmp_path):
    with pytest.raises(ValueError, match="no text to train a vocabulary on"):
        train_vocabulary(texts, SIZE, tmp_path / "v")


@pytest.mark.parametrize(("size", "limit"), [(4, "at least"), (5_000, "at most")])
def test_a_size_that_the_text_does_not_allow_says_what_to_do(size, limit, tmp_path):
    expected = rf"no vocabulary of {size} tokens can be trained on 4 lines of text: {limit} \d+\. Set vocabulary_size"
    with pytest.raises(ValueError, match=expected):
        train_vocabulary(TEXTS, size, tmp_path / "v")
