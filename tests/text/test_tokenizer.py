"""Reading tokenizer files, encoding, special tokens, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models
from toy_tokenizers import NAMES, word_level, write

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text.tokenizer import Tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_text_become_ids(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("<bos>hello<|turn>hello<turn|>")
    assert ids[0] == tokenizer.token_id("<bos>")
    assert tokenizer.token_id("<|turn>") in ids
    assert ids[-1] == tokenizer.token_id("<turn|>")


def test_user_defined_pieces_are_found_and_shown(loaded):
    tokenizer = loaded["sentencepiece"]
    start = tokenizer.token_id("<start>")
    assert start in tokenizer.encode("hello<start>hello")
    assert start not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<start>b")) == "a<start>b"


def test_added_tokens_that_are_not_special_are_shown(loaded):
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("é<|plain|>é")
    assert tokenizer.token_id("<|plain|>") in ids
    assert tokenizer.decode(ids) == "é<|plain|>é"


def test_config_flags_user_defined_pieces_as_special(folders, tmp_path):
    model = folders["sentencepiece"] / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    added = {
        "7": {"content": "<start>", "special": True},
        "8": {"content": "<turn|>", "special": False},
        "9": {"content": "<absent>", "special": True},
        "10": "torn",
    }
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.token_id("<start>") in tokenizer.special_ids
    assert tokenizer.token_id("<turn|>") not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<start>b")) == "ab"


@pytest.mark.parametrize("name", NAMES)
def test_ids_outside_the_vocabulary_are_replacement_characters(loaded, name):
    tokenizer = loaded[name]
    bad = [tokenizer.vocab_size, -1, 2**31, 2**40, -(2**70)]
    for token in bad:
        assert tokenizer.token(token) == "\ufffd"
    shown = tokenizer.decode(bad)
    # CTC reads the same piece twice as once.
    assert shown.count("\ufffd") == (1 if name == "ctc" else len(bad))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tokenizer_knows_of_itself(loaded, name):
    tokenizer = loaded[name]
    assert tokenizer.bos_token_id == tokenizer.token_id("<bos>")
    # Only sentencepiece models tell their padding without a configuration.
    assert tokenizer.pad_token_id == (0 if name.startswith("sentence") else None)
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.token(tokenizer.bos_token_id) == "<bos>"
    assert all(tokenizer.token(i) for i in range(tokenizer.vocab_size))
    assert tokenizer.chat_template is None


def test_add_special_tokens_puts_bos_in_front(loaded):
    for name in ("byte_level", "sentencepiece"):
        plain = loaded[name].encode("hello")
        assert loaded[name].encode("hello", add_special_tokens=True) == [2, *plain]


def test_sentencepiece_obeys_add_bos_and_add_eos(folders, tmp_path):
    model = folders["sentencepiece"] / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"add_bos_token": False, "add_eos_token": True}
    write(tmp_path, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("hello", True) == [*tokenizer.encode("hello"), 1]


def test_tokenizer_json_comes_before_the_model(folders, tmp_path):
    for name, file in (("word_level", ".json"), ("sentencepiece", ".model")):
        data = (folders[name] / f"tokenizer{file}").read_bytes()
        (tmp_path / f"tokenizer{file}").write_bytes(data)
    assert Tokenizer.from_dir(tmp_path).vocab_size == 10


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path):
    fast = word_level()
    fast.enable_truncation(max_length=2)
    fast.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    fast.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("a a a")) == 3


def test_named_tokens_may_be_objects(folders, tmp_path):
    data = (folders["word_level"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    config = {"bos_token": {"content": "<bos>"}, "pad_token": "<pad>"}
    tokenizer = Tokenizer.from_dir(write(tmp_path, "tokenizer_config.json", config))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (3, 1)


def test_a_model_file_alone_tells_its_bos(folders, tmp_path):
    model = folders["sentencepiece"] / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    assert Tokenizer.from_dir(tmp_path).bos_token_id == 2


def test_the_older_file_of_named_tokens_is_read(folders, tmp_path):
    data = (folders["word_level"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<bos>"})
    assert Tokenizer.from_dir(tmp_path).bos_token_id == 3


def refused(folder: Path) -> str:
    """The one-line message with which a folder is refused."""
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    message = refused(tmp_path)
    assert "no tokenizer.json and no tokenizer.model" in message


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": 3}', b'{"a": "\xff"}']
)
def test_a_broken_tokenizer_json_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert "tokenizer.json: broken (" in refused(tmp_path)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x00" * 40])
def test_a_broken_tokenizer_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert "tokenizer.model: broken (" in refused(tmp_path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    assert "tokenizer.json: cannot be read" in refused(tmp_path)


def test_a_word_vocabulary_without_unknown_is_refused(tmp_path):
    Fast(models.WordLevel({"a": 0}, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert "model.unk_token is '[UNK]', which the vocabulary lacks" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ('{"bos_token": ', "tokenizer_config.json: broken JSON (Expecting value: line 1"),
        ("[1]", "tokenizer_config.json: is list, not an object"),
        ('{"bos_token": "<none>"}', "bos_token is '<none>', which the vocabulary"),
        ('{"pad_token": "<none>"}', "pad_token is '<none>', which the vocabulary"),
        ('{"bos_token": 3}', "bos_token must be text"),
        ('{"chat_template": 3}', "tokenizer_config.json: chat_template must be text"),
        ('{"chat_template": ["a"]}', "chat_template must be text or a list of name"),
        (
            '{"chat_template": [{"name": "rag", "template": "x"}]}',
            'chat_template has none named "default"; add one',
        ),
    ],
)
def test_a_broken_config_is_refused(tmp_path, config, why):
    word_level().save(str(tmp_path / "tokenizer.json"))
    assert why in refused(write(tmp_path, "tokenizer_config.json", config))


def test_bad_utf8_is_refused(tmp_path):
    word_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    assert "tokenizer_config.json: not UTF-8 at byte 7" in refused(tmp_path)


def test_a_lone_surrogate_is_refused(loaded):
    for name in ("byte_level", "sentencepiece"):
        with pytest.raises(SettingsError, match="lone surrogate at character 2"):
            loaded[name].encode("ab\ud800")


def test_importing_is_light():
    code = (
        "import sys, mlx_dgemma.text.tokenizer, mlx_dgemma.text.chat\n"
        "heavy = {'tokenizers', 'sentencepiece', 'jinja2', 'mlx', 'numpy', 'torch',"
        " 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
