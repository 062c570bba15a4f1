"""Small real tokenizers, built on the spot."""

import json
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]
MARKED = [*SPECIAL, "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"]
MARKED += ['<|"|>', "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>"]
MARKED += ["<|think|>", "<|image|>", "<|image>", "<image|>"]
LINES = [
    "the quick brown fox jumps over the lazy dog",
    "hello hello world, a world of words and more words",
    "naïve café 日本語 text with émigrés",
    "0123456789 +-*/ ()[]{} \t tabs",
] * 4


def special_tokens(pieces: list[str]) -> list[AddedToken]:
    return [AddedToken(t, special=True, normalized=False) for t in pieces]


def byte_level(special: list[str] = SPECIAL) -> Tokenizer:
    """Byte-level BPE, trained."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    options = {"special_tokens": special_tokens(special), "show_progress": False}
    options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(LINES, BpeTrainer(vocab_size=400, **options))
    fast.add_tokens([AddedToken("<|plain|>", special=False, normalized=False)])
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return fast


def byte_fallback(special: list[str] = SPECIAL) -> Tokenizer:
    """BPE over characters with byte fallback, as Gemma's tokenizer.json is."""
    pieces = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"helowrd,", "\n", "▁▁", "he", "ll", "hell", "hello", "▁hello"]
    merges = [("▁", "▁"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    merges += [("▁", "hello")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
    )
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens(special_tokens(special))
    return fast


def word_level() -> Tokenizer:
    """Whole words, no decoder: words are joined by spaces."""
    words = ["<unk>", *SPECIAL, "hello", "world", "a", "of"]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(special_tokens(SPECIAL))
    return fast


def with_decoder(decoder: decoders.Decoder) -> Tokenizer:
    fast = byte_fallback()
    fast.decoder = decoder
    return fast


STRIPPING = decoders.Sequence(
    [
        *(decoders.Replace("▁", " "), decoders.ByteFallback()),
        *(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    ]
)
REWRITING = decoders.Sequence([STRIPPING, decoders.Replace("o ", "0")])
FAST = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_level": word_level,
    "stripping": lambda: with_decoder(STRIPPING),
    "metaspace": lambda: with_decoder(decoders.Metaspace()),
    "word_piece": lambda: with_decoder(decoders.WordPiece()),
    "suffix": lambda: with_decoder(decoders.BPEDecoder(suffix="o")),
    "ctc": lambda: with_decoder(decoders.CTC()),
    "anchor_eater": lambda: with_decoder(decoders.Strip("a", 1, 0)),
    "rewriting": lambda: with_decoder(REWRITING),
}
NAMES = [*FAST, "sentencepiece", "sentencepiece_plain"]


def train_sentencepiece(folder: Path, dummy_prefix: bool) -> None:
    import sentencepiece

    names = ["pad", "eos", "bos", "unk"]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        **{f"{name}_id": i for i, name in enumerate(names)},
        **{f"{name}_piece": f"<{name}>" for name in names},
        control_symbols=["<|turn>"],
        user_defined_symbols=["<turn|>", "<start>"],
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=dummy_prefix,
        normalization_rule_name="identity",
        minloglevel=2,
    )


def write(folder: Path, name: str, value: object) -> Path:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def refusal(kind: type[Exception], call, *args, **kwargs) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
