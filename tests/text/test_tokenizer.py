"""Reading tokenizer files, encoding, special tokens, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models
from toy_tokenizers import NAMES, byte_fallback, refusal, word_level, write

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text.tokenizer import Tokenizer


def copy(source: Path, folder: Path, config: dict | None = None) -> Path:
    """The tokenizer files of `source`, with another tokenizer_config.json or none."""
    for path in source.glob("tokenizer.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        write(folder, "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_tokenizer(loaded, name):
    tokenizer = loaded[name]
    bos = tokenizer.token_id("<bos>")
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<bos>", bos)
    # only sentencepiece models name their padding without a configuration
    assert tokenizer.pad_token_id == (0 if name.startswith("sentence") else None)
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.token(bos) == "<bos>"
    assert all(tokenizer.token(i) for i in range(tokenizer.vocab_size))
    assert tokenizer.chat_template is None
    ids = tokenizer.encode("<bos>hello<|turn>hello<turn|>")
    assert ids[0] == bos and ids[-1] == tokenizer.token_id("<turn|>")
    assert tokenizer.token_id("<|turn>") in ids
    bad = [tokenizer.vocab_size, -1, 2**31, 2**40, -(2**70)]
    assert {tokenizer.token(token) for token in bad} == {"\ufffd"}
    # CTC reads the same piece twice as once
    count = 1 if name == "ctc" else len(bad)
    assert tokenizer.decode(bad).count("\ufffd") == count


def test_tokens_that_are_not_special_are_shown(loaded):
    for name, piece in (("sentencepiece", "<start>"), ("byte_level", "<|plain|>")):
        tokenizer = loaded[name]
        ids = tokenizer.encode(f"a{piece}b")
        assert tokenizer.token_id(piece) in ids
        assert tokenizer.token_id(piece) not in tokenizer.special_ids
        assert tokenizer.decode(ids) == f"a{piece}b"


def test_config_flags_user_defined_pieces_as_special(folders, tmp_path):
    added = {
        "7": {"content": "<start>", "special": True},
        "8": {"content": "<turn|>", "special": False},
        "9": {"content": "<absent>", "special": True},
        "10": "torn",
    }
    config = {"added_tokens_decoder": added}
    tokenizer = Tokenizer.from_dir(copy(folders["sentencepiece"], tmp_path, config))
    assert tokenizer.token_id("<start>") in tokenizer.special_ids
    assert tokenizer.token_id("<turn|>") not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<start>b")) == "ab"
    assert tokenizer.bos_token_id == 2  # the model file names it


def test_add_special_tokens(loaded, folders, tmp_path):
    for name in ("byte_level", "sentencepiece"):
        plain = loaded[name].encode("hello")
        assert loaded[name].encode("hello", add_special_tokens=True) == [2, *plain]
    config = {"add_bos_token": False, "add_eos_token": True}
    tokenizer = Tokenizer.from_dir(copy(folders["sentencepiece"], tmp_path, config))
    assert tokenizer.encode("hello", True) == [*tokenizer.encode("hello"), 1]


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path):
    fast = word_level()
    fast.enable_truncation(max_length=2)
    fast.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    fast.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("a a a")) == 3


def test_named_tokens(folders, tmp_path):
    for name in ("word_level", "sentencepiece"):  # tokenizer.json comes first
        copy(folders[name], tmp_path)
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<bos>"})
    assert Tokenizer.from_dir(tmp_path).bos_token_id == 3
    config = {"bos_token": {"content": "<bos>"}, "pad_token": "<pad>"}
    tokenizer = Tokenizer.from_dir(write(tmp_path, "tokenizer_config.json", config))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (3, 1)
    assert tokenizer.vocab_size == 10


def refused(folder: Path) -> str:
    message = refusal(TokenizerError, Tokenizer.from_dir, folder)
    assert str(folder) in message
    return message


def test_a_broken_tokenizer_is_refused(tmp_path):
    assert "no tokenizer.json and no tokenizer.model" in refused(tmp_path)
    for name, garbage in (
        ("tokenizer.model", (b"", b"garbage", b"\x00" * 40)),
        ("tokenizer.json", (b"", b"{", b"[]", b'{"a": 3}')),
    ):
        for data in garbage:
            (tmp_path / name).write_bytes(data)
            assert f"{name}: broken (" in refused(tmp_path)
    piece = b"\n\x0b\n\x02\xff\xfe\x15\x00\x00\x00\x00"
    (tmp_path / "tokenizer.model").write_bytes(piece)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    assert "tokenizer.json: not UTF-8 at byte 0" in refused(tmp_path)
    Fast(models.WordLevel({"a": 0}, "[UNK]")).save(str(path))
    assert "model.unk_token is '[UNK]', which the vocabulary lacks" in refused(tmp_path)
    path.unlink()
    path.mkdir()
    assert "tokenizer.json: cannot be read" in refused(tmp_path)


def test_a_panic_inside_tokenizers_is_refused_in_one_line(tmp_path, capfd):
    """Of Rust: no Exception of Python, and for merges cut in a character an abort."""
    whole = json.loads(byte_fallback().to_str())
    for prefix in ("a", "aaa", "\u2581"):
        model = whole["model"] | {"continuing_subword_prefix": prefix}
        write(tmp_path, "tokenizer.json", whole | {"model": model})
        wrong = "tokenizer.json: model.merges[0]: "
        if prefix == "\u2581":
            wrong = "tokenizer.json: model.merges[1]: 'e' does not begin with contin"
        assert wrong in refused(tmp_path)
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {},
    }
    write(tmp_path, "tokenizer.json", whole)
    with pytest.raises(TokenizerError, match="broken"):
        Tokenizer.from_dir(tmp_path).encode("a", add_special_tokens=True)
    assert "panicked" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ('{"bos_token": ', "tokenizer_config.json: broken JSON (Expecting value: li"),
        ("[1]", "tokenizer_config.json: is list, not an object"),
        (b'{"a": "\xff"}', "tokenizer_config.json: not UTF-8 at byte 7"),
        ('{"bos_token": "<none>"}', "bos_token is '<none>', which the vocabulary"),
        ('{"pad_token": "<none>"}', "pad_token is '<none>', which the vocabulary"),
        ('{"bos_token": 3}', "bos_token must be text"),
        ('{"chat_template": 3}', "tokenizer_config.json: chat_template must be text"),
        ('{"chat_template": ["a"]}', "chat_template must be text, or a list of"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', 'named "default"'),
        ('{"chat_template": [{"name": "default"}]}', "chat_template must be text"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, config, why):
    word_level().save(str(tmp_path / "tokenizer.json"))
    data = config if isinstance(config, bytes) else config.encode()
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    assert why in refused(tmp_path)


def test_a_lone_surrogate_is_refused(loaded):
    for name in ("byte_level", "sentencepiece"):
        with pytest.raises(SettingsError, match="lone surrogate at character 2"):
            loaded[name].encode("ab\ud800")


@pytest.mark.slow
def test_importing_is_light():
    code = "import sys, mlx_dgemma.text.tokenizer, mlx_dgemma.text.chat\n"
    code += "print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"tokenizers", "jinja2", "mlx", "numpy", "torch"} & set(modules)
