"""The 32-token vocabulary of the toy checkpoints, and its chat template.

One token per digit, space, newline and sign, one per role name, so any text made of
them is encoded and decoded without loss. The special tokens are Gemma's, renumbered.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, BOS, TURN_START, TURN_END = 0, 1, 2, 3, 4
IMAGE_START, IMAGE_END, IMAGE = 7, 8, 9

SPECIAL = {
    "<pad>": PAD,
    "<eos>": EOS,
    "<bos>": BOS,
    "<|turn>": TURN_START,
    "<turn|>": TURN_END,
    "<|channel>": 5,
    "<channel|>": 6,
    "<|image>": IMAGE_START,
    "<image|>": IMAGE_END,
    "<|image|>": IMAGE,
    "<unk>": 26,
    "<|think|>": 27,
}
WORDS = ["user", "model", "system", "thought"]
PLAIN = {"\n": 10, " ": 11}
PLAIN |= {str(digit): 12 + digit for digit in range(10)}
PLAIN |= {word: 22 + i for i, word in enumerate(WORDS)}
PLAIN |= {char: 28 + i for i, char in enumerate(".-|+")}
VOCAB_SIZE = 32

CHAT_TEMPLATE = """\
{{- '<bos>' -}}
{%- set ns = namespace(messages=messages, system='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] | trim -%}
    {%- set ns.messages = messages[1:] -%}
{%- endif -%}
{%- if ns.system or enable_thinking is true -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking is true -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {{- ns.system + '<turn|>\\n' -}}
{%- endif -%}
{%- for message in ns.messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- set content = message['content'] -%}
    {%- if content is not string -%}
        {%- set content = content | map(attribute='text') | join -%}
    {%- endif -%}
    {{- '<|turn>' + role + '\\n' + content | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if enable_thinking is not true -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """The tokenizer: text -> ids in 0…31, and back to exactly the same text."""
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | PLAIN, unk_token="<unk>"))
    pieces = Regex("|".join(WORDS) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to `path`."""
    build_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
