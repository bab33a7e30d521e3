"""Vocabularies of Hugging Face's directories: the ids and texts of `AutoTokenizer`, special tokens, and files that travel."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import SAMPLES, SIZE, SPACED, huggingface_directory, sentencepiece_directory, template, write_json
from tokenizers import models

from clp_jax.data.vocabulary import (
    DIRECTORY_NAME,
    FILE_NAME,
    TOKENIZER_FILES,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    train_vocabulary,
)

KINDS = ("t5", "llama3", "qwen", "gemma", "llama")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        make = sentencepiece_directory if kind in ("gemma", "llama") else huggingface_directory
        make(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def vocabularies(home):
    return {kind: Vocabulary.load(home / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def theirs(home):
    transformers = pytest.importorskip("transformers", reason="the parity reference needs the extra `hf`")
    return {kind: transformers.AutoTokenizer.from_pretrained(home / kind) for kind in KINDS}


@pytest.fixture
def copy(home, tmp_path):
    """Copies a directory, to be damaged, with some keys of a JSON file replaced or, where None stands, removed."""

    def make(kind, file=None, **changes):
        target = shutil.copytree(home / kind, tmp_path / kind)
        if file is not None:
            content = json.loads((target / file).read_text()) | changes
            write_json(target / file, {name: value for name, value in content.items() if value is not ...})
        return target

    return make


def test_each_directory_is_of_its_kind(vocabularies):
    found = {kind: type(vocabulary) for kind, vocabulary in vocabularies.items()}
    files = dict.fromkeys(("gemma", "llama"), SentencePieceVocabulary)
    assert found == dict.fromkeys(("t5", "llama3", "qwen"), HuggingFaceVocabulary) | files
    assert all(isinstance(vocabulary, Vocabulary) for vocabulary in vocabularies.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_ids_and_texts_are_those_of_autotokenizer(vocabularies, theirs, kind, text):
    ours, reference = vocabularies[kind], theirs[kind]
    plain = list(reference(text, add_special_tokens=False).input_ids)
    assert ours.encode(text) == plain
    assert ours.encode_prompt(text) == list(reference(text).input_ids)
    assert ours.encode_target(text) == [*plain, reference.eos_token_id]
    padded = [*reference(text).input_ids, reference.eos_token_id, *plain, *[ours.pad_id] * 3]
    expected = reference.decode(reference(text).input_ids, skip_special_tokens=True)
    assert ours.decode(padded) == ours.decode(plain) == expected


@pytest.mark.parametrize("kind", ["t5", "llama3", "qwen", "gemma"])
@pytest.mark.parametrize("text", SPACED)
def test_spaces_are_those_of_autotokenizer(vocabularies, theirs, kind, text):
    ids = vocabularies[kind].encode(text)
    assert ids == list(theirs[kind](text, add_special_tokens=False).input_ids)
    assert vocabularies[kind].decode(ids) == theirs[kind].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_those_of_autotokenizer(vocabularies, theirs, kind):
    ours, reference = vocabularies[kind], theirs[kind]
    assert ours.eos_ids[0] == reference.eos_token_id
    assert (ours.bos_id, ours.unk_id) == (reference.bos_token_id, reference.unk_token_id)
    assert ours.size == len(reference)
    if kind == "qwen":
        assert reference.pad_token_id in ours.eos_ids and ours.pad_id == -1
    else:
        assert ours.pad_id == (-1 if reference.pad_token_id is None else reference.pad_token_id)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_what_transformers_saves_of_a_model_has_its_ids(vocabularies, theirs, kind, tmp_path):
    theirs[kind].save_pretrained(tmp_path)
    found = Vocabulary.load(tmp_path)
    assert isinstance(found, HuggingFaceVocabulary)
    for text in SAMPLES:
        assert found.encode(text) == vocabularies[kind].encode(text)
        assert found.encode_prompt(text) == vocabularies[kind].encode_prompt(text)
        assert found.decode(found.encode(text)) == vocabularies[kind].decode(vocabularies[kind].encode(text))


def test_special_tokens_in_a_text_are_read_as_such_as_autotokenizer_does(vocabularies, theirs):
    for kind, text in (("t5", "a <extra_id_0> b</s>c"), ("qwen", "<|im_start|>user\nhi<|im_end|>\n")):
        assert vocabularies[kind].encode(text) == list(theirs[kind](text, add_special_tokens=False).input_ids)
    # A SentencePiece model reads them as text.
    llama = vocabularies["llama"]
    assert llama.decode(llama.encode("a </s> b")) == "a </s> b" and not set(llama.encode("</s>")) & set(llama.eos_ids)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # pad, ends, start, unknown; what is around a prompt.
    [
        ("t5", (0, (1,), None, 2, [], [1])),
        ("gemma", (0, (1,), 2, 3, [2], [])),
        ("llama", (-1, (2,), 1, 0, [1], [])),
        ("llama3", (303, (302, 301), 300, None, [300], [])),
        ("qwen", (-1, (302, 300), None, None, [], [])),
    ],
)
def test_families_are_told_apart(vocabularies, kind, expected):
    ours = vocabularies[kind]
    pad, ends, bos, unk, before, after = expected
    assert (ours.pad_id, ours.eos_ids, ours.bos_id, ours.unk_id) == (pad, ends, bos, unk)
    ids = ours.encode("quick jump")
    assert ids and not set(ids) & {pad, *ends, bos}
    assert ours.encode_prompt("quick jump") == [*before, *ids, *after]
    assert ours.encode_target("quick jump") == [*ids, ends[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_stop_at_the_first_of_the_ends(vocabularies, kind):
    ours = vocabularies[kind]
    ids, more = ours.encode("lazy dog"), ours.encode("fox")
    around = [ours.pad_id, *([] if ours.bos_id is None else [ours.bos_id]), ours.size, ours.size + 9, -1]
    rows = [[*around, *ids, end, *more] for end in ours.eos_ids]
    rows += [[*ids, *around, *more], [ours.pad_id] * 4, [ours.eos_ids[0], *ids]]
    length = max(map(len, rows))
    batch = np.asarray([[*row, *[ours.pad_id] * (length - len(row))] for row in rows], np.int32)
    expected = [ours.decode(ids)] * len(ours.eos_ids) + [ours.decode([*ids, *more]), "", ""]
    assert ours.decode_batch(batch) == expected == [ours.decode(row) for row in batch]
    assert expected[0].strip() == "lazy dog" and ours.decode_batch(batch[:0]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_all_files_travel_bit_for_bit(vocabularies, home, kind, tmp_path):
    (home / kind / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (home / kind / "model.safetensors").write_bytes(b"not of the tokenizer")
    ours = vocabularies[kind]
    assert ours.save(tmp_path) == ours.save(tmp_path) == tmp_path / DIRECTORY_NAME
    saved = {path.name: path.read_bytes() for path in (tmp_path / DIRECTORY_NAME).iterdir()}
    assert saved == {path.name: path.read_bytes() for path in (home / kind).iterdir() if path.suffix != ".safetensors"}
    assert set(saved) <= set(TOKENIZER_FILES)
    for where in (tmp_path, tmp_path / DIRECTORY_NAME):
        again = Vocabulary.load(where)
        assert type(again) is type(ours) and again.fingerprint == ours.fingerprint
        assert again.encode_prompt(SAMPLES[0]) == ours.encode_prompt(SAMPLES[0])
    again.save(tmp_path)  # Onto itself.
    assert {path.name: path.read_bytes() for path in (tmp_path / DIRECTORY_NAME).iterdir()} == saved


def test_a_saved_vocabulary_leaves_nothing_of_an_earlier_one(vocabularies, tmp_path):
    vocabularies["qwen"].save(tmp_path)
    vocabularies["gemma"].save(tmp_path)
    assert Vocabulary.load(tmp_path).fingerprint == vocabularies["gemma"].fingerprint


def test_one_directory_has_one_vocabulary(vocabularies, home, tmp_path):
    vocabularies["qwen"].save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer is another vocabulary than .*tokenizer\.model: choose another"):
        Vocabulary.load(home / "gemma" / "tokenizer.model").save(tmp_path)
    (tmp_path / "b").mkdir()
    Vocabulary.load(home / "gemma" / "tokenizer.model").save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"vocabulary\.model is another vocabulary than .*tokenizer\.json"):
        vocabularies["qwen"].save(tmp_path / "b")


def test_a_model_file_speaks_for_itself(home, vocabularies, copy):
    gemma = copy("gemma", "config.json", eos_token_id=[1, 7], vocab_size=1)  # Nobody asked these files.
    file = Vocabulary(gemma / "tokenizer.model")
    assert (file.pad_id, file.eos_ids, file.bos_id, file.unk_id) == (0, (1,), 2, 3)
    assert file.encode_prompt("fox") == vocabularies["gemma"].encode_prompt("fox")
    llama = Vocabulary(home / "llama" / "tokenizer.model")
    assert (llama.pad_id, llama.eos_ids, llama.bos_id, llama.unk_id) == (-1, (2,), 1, 0)
    assert llama.encode_prompt("fox")[0] == 1


def test_a_model_file_alone_is_read_as_sentencepiece_reads_it(copy):
    """Hugging Face's tokenizer of Mistral's leaves the space before a text out; with it, it gives the same ids."""
    transformers = pytest.importorskip("transformers", reason="the parity reference needs the extra `hf`")
    mistral = copy("llama", "config.json", model_type="mistral")
    ours, theirs = Vocabulary.load(mistral), transformers.AutoTokenizer.from_pretrained(mistral)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    for text in ("fox", "the quick fox", " fox", "fox\n jumps ", "é 12"):
        assert ours.encode(text) == processor.encode(text)
        assert theirs.encode(" " + text, add_special_tokens=False) == ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) != ours.encode(text)


@pytest.mark.parametrize(
    ("run", "text", "shown"),
    [
        (b"\xc3\xa9", "é", "é"),
        (b"\xe2\x82", "��", "��"),
        (b"\xff\xc3\xa9", "�é", "���"),
        (b"A\xe2\x82", "A��", "���"),
        (b"\xf0\x9f\x98\x80\xe2", "😀�", "�����"),
    ],
)
def test_bytes_that_are_no_characters(home, vocabularies, theirs, run, text, shown):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(home / "llama" / "tokenizer.model"))
    ids = [*processor.encode("fox"), *(processor.piece_to_id(f"<0x{byte:02X}>") for byte in run)]
    assert vocabularies["llama"].decode(ids) == "fox" + text
    assert theirs["llama"].decode(ids) == "fox" + shown


def test_a_tokenizer_file_is_read_with_the_files_beside_it(home, vocabularies):
    file = Vocabulary(home / "llama3" / "tokenizer.json")
    assert file.fingerprint == vocabularies["llama3"].fingerprint


def test_a_tokenizer_file_of_another_name_is_saved_under_the_usual_one(copy, vocabularies, tmp_path):
    directory = copy("t5")
    (directory / "tokenizer.json").rename(directory / "mine.json")
    Vocabulary.load(directory / "mine.json").save(tmp_path)
    assert Vocabulary.load(tmp_path).fingerprint == vocabularies["t5"].fingerprint


def test_fingerprints_tell_what_decides_the_ids(vocabularies, copy, tmp_path):
    assert len({vocabulary.fingerprint for vocabulary in vocabularies.values()}) == len(KINDS)
    directory = copy("llama3", "generation_config.json", eos_token_id=[301], temperature=0.5)
    other = Vocabulary.load(directory)
    assert other.eos_ids == (302, 301) and other.fingerprint == vocabularies["llama3"].fingerprint
    write_json(directory / "generation_config.json", {"eos_token_id": [302]})
    assert Vocabulary.load(directory).fingerprint != other.fingerprint


def test_lengths_that_a_tokenizer_was_trained_with_are_left_out(home, vocabularies, copy):
    directory = copy("qwen")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert Vocabulary.load(directory).encode(SAMPLES[0]) == vocabularies["qwen"].encode(SAMPLES[0])


@pytest.mark.parametrize(("declared", "before", "after"), [(True, [300], [301]), (False, [300], []), (None, [300], [])])
def test_an_end_after_the_text_is_for_encoders_alone(copy, declared, before, after):
    directory = copy("llama3")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    template(tokenizer, "<|begin_of_text|>", "<|end_of_text|>")
    tokenizer.save(str(directory / "tokenizer.json"))
    if declared is None:
        (directory / "config.json").unlink()
    else:
        write_json(directory / "config.json", {"is_encoder_decoder": declared})
    ours = Vocabulary.load(directory)
    assert ours.encode_prompt("fox") == [*before, *ours.encode("fox"), *after]


def test_an_encoder_reads_an_end_though_the_template_has_none(copy):
    directory = copy("qwen", "config.json", is_encoder_decoder=True)
    ours = Vocabulary.load(directory)
    assert ours.encode_prompt("fox") == [*ours.encode("fox"), ours.eos_ids[0]]
    directory = copy("gemma", "config.json", is_encoder_decoder=True)
    ours = Vocabulary.load(directory)
    assert ours.encode_prompt("fox") == [*ours.encode("fox"), 1]


def test_t5_is_known_without_its_config(copy):
    directory = copy("t5")
    (directory / "config.json").unlink()
    ours = Vocabulary.load(directory)
    assert ours.encode_prompt("fox") == [*ours.encode("fox"), 1]


def test_a_start_that_is_not_wanted_is_not_written(copy):
    ours = Vocabulary.load(copy("gemma", "tokenizer_config.json", add_bos_token=False))
    assert ours.bos_id == 2 and ours.encode_prompt("fox") == ours.encode("fox")


def test_a_template_is_known_though_the_probe_has_no_token(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "漢": 2}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template(tokenizer, "<s>", "</s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    ours = Vocabulary.load(tmp_path)
    assert ours.encode_prompt("漢漢") == [0, 2, 2] and ours.encode_target("漢") == [2, 1]


def test_tokens_of_the_json_files_are_added(copy, vocabularies):
    entry = {"content": "<think>", "special": False, "lstrip": True}
    directory = copy("qwen", "tokenizer_config.json", added_tokens_decoder={"303": entry})
    ours = Vocabulary.load(directory)
    assert ours.size == vocabularies["qwen"].size + 1
    assert ours.encode("a  <think>b") == [*ours.encode("a"), 303, *ours.encode("b")]
    assert ours.decode([303]) == "<think>" and ours.fingerprint != vocabularies["qwen"].fingerprint


def test_a_token_that_the_json_files_call_special_is_left_out_of_texts(copy):
    directory = copy("t5", "tokenizer_config.json", unk_token="z")
    ours = Vocabulary.load(directory)
    assert ours.unk_id == ours.encode("z")[-1] != 2 and ours.decode(ours.encode("z")) == ""


def test_tokens_beyond_the_model_are_refused_where_a_text_has_them(copy, vocabularies):
    # Some files have tokens for images that the model of texts has no row for.
    directory = copy("llama3", "config.json", vocab_size=303)
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"})
    ours = Vocabulary.load(directory)
    assert ours.size == 303 and ours.encode("fox") == vocabularies["llama3"].encode("fox")
    with pytest.raises(ValueError, match=r"text 'a <\|pad\|>' has '<\|pad\|>', token 303: expected ids below the 303"):
        ours.encode("a <|pad|>")


@pytest.mark.parametrize(
    ("kind", "file", "changes", "expected"),
    [
        (
            "qwen",
            "config.json",
            {"vocab_size": 299},
            r"tokenizer\.json has 300 tokens, config\.json .* vocab_size is 299",
        ),
        (
            "gemma",
            "config.json",
            {"vocab_size": 9},
            rf"tokenizer\.model has {SIZE} tokens, config\.json .* is 9: expected",
        ),
        (
            "qwen",
            "config.json",
            {"vocab_size": "many"},
            r"config\.json: vocab_size is 'many': expected a positive number",
        ),
        ("qwen", "config.json", {"vocab_size": 301}, r"qwen: the end token is 302, the vocabulary has 301 tokens"),
        ("llama3", "generation_config.json", {"eos_token_id": [301, 999]}, r"the end token is 999, .* has 304 tokens"),
        (
            "llama3",
            "generation_config.json",
            {"eos_token_id": "2"},
            r"eos_token_id is '2': expected a token id, or a list",
        ),
        (
            "llama3",
            "generation_config.json",
            {"eos_token_id": [True]},
            r"eos_token_id is \[True\]: expected a token id",
        ),
        ("llama3", "generation_config.json", {"eos_token_id": -5}, r"the end token is -5, .* expected an id below 304"),
        ("gemma", "config.json", {"eos_token_id": SIZE}, rf"the end token is {SIZE}, the vocabulary has {SIZE} tokens"),
        (
            "t5",
            "tokenizer_config.json",
            {"pad_token": "[PAD]"},
            r"t5: pad_token is '\[PAD\]', which is not in the vocab",
        ),
        (
            "gemma",
            "tokenizer_config.json",
            {"eos_token": "<end>"},
            r"gemma: eos_token is '<end>', which is not in the voc",
        ),
        (
            "t5",
            "tokenizer_config.json",
            {"pad_token": 3},
            r"tokenizer_config\.json: pad_token is 3: expected the token's",
        ),
        ("t5", "tokenizer_config.json", {"added_tokens_decoder": {"7": "<x>"}}, r"added_tokens_decoder has '7': '<x>'"),
        (
            "t5",
            "tokenizer_config.json",
            {"added_tokens_decoder": [1]},
            r"added_tokens_decoder has '': \[1\]: expected an",
        ),
        (
            "t5",
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": "<extra_id_0>"}}},
            r"'<extra_id_0>' is token 9 in tokenizer_config\.json and \d+ in tokenizer\.json",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_named(copy, kind, file, changes, expected):
    with pytest.raises(ValueError, match=expected) as error:
        Vocabulary.load(copy(kind, file, **changes))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_is_refused(copy, tmp_path):
    directory = copy("qwen", "config.json", eos_token_id=...)
    write_json(directory / "generation_config.json", {})
    write_json(directory / "tokenizer_config.json", {"eos_token": None})
    with pytest.raises(ValueError, match=r"qwen: no token ends a text: expected eos_token in tokenizer_config\.json"):
        Vocabulary.load(directory)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(copy, content):
    directory = copy("qwen")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of Hugging Face's .*: expected") as error:
        Vocabulary.load(directory)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_panics_is_named(copy):
    directory = copy("llama3")
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    content["post_processor"]["special_tokens"] = {}
    write_json(directory / "tokenizer.json", content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of Hugging Face's \(no entry found"):
        Vocabulary.load(directory)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "holds a list: expected a JSON object")],
)
def test_a_json_file_that_is_none_is_named(copy, file, content, expected):
    directory = copy("qwen")
    (directory / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{file} {expected}"):
        Vocabulary.load(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_utf8_is_named(vocabularies, kind):
    for encode in (vocabularies[kind].encode, vocabularies[kind].encode_prompt, vocabularies[kind].encode_target):
        with pytest.raises(ValueError, match=r"text 'ab\\udcff' is not UTF-8 at character 2"):
            encode("ab\udcff")


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>"])
def test_padding_that_a_text_can_have_is_none(copy, token):
    assert Vocabulary.load(copy("llama", "tokenizer_config.json", pad_token=token)).pad_id == -1


def test_a_trained_vocabulary_is_a_sentencepiece_one(tmp_path):
    train_vocabulary(["the quick brown fox jumps over a lazy dog"], 30, tmp_path / FILE_NAME)
    ours = Vocabulary.load(tmp_path)
    assert type(ours) is SentencePieceVocabulary and type(SentencePieceVocabulary(tmp_path)) is SentencePieceVocabulary
    assert (ours.pad_id, ours.eos_ids, ours.bos_id, ours.unk_id) == (0, (1,), None, 2)
    assert ours.encode_prompt("lazy fox") == ours.encode_target("lazy fox") == [*ours.encode("lazy fox"), 1]
