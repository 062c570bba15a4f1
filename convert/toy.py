"""Configuration, vocabulary and chat template of the toy checkpoints.

The configuration has the release's keys with small sizes. The vocabulary has 32 tokens:
one per digit, space, newline and sign, one per role name, so any text made of them is
encoded and decoded without loss. The special tokens are Gemma's, renumbered.
"""

import json
from copy import deepcopy
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

TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "padding_side": "left",
}
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
TEXT = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": None,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "top_k_experts": 2,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "use_bidirectional_attention": "vision",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "default_output_length": 280,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": True,
    "use_clipped_linears": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
}


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer of texts and ids in 0…31."""
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | PLAIN, unk_token="<unk>"))
    pieces = Regex("|".join(WORDS) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def release_config(
    text: dict | None = None,
    vision: dict | None = None,
    canvas_length: int = 32,
    dtype: str = "float32",
) -> dict:
    """Return config.json in the release's layout; `text`, `vision` override defaults.

    Without `layer_types` every fourth layer and the last have full attention; with
    them `num_hidden_layers` follows. Raises ValueError for keys the release lacks.
    """
    text, vision = text or {}, vision or {}
    if unknown := sorted(set(text) - set(TEXT) | set(vision) - set(VISION)):
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    config = deepcopy(TEXT | text)  # transformers 5.11 writes into what it reads
    if config["layer_types"] is None:
        last = config["num_hidden_layers"] - 1
        config["layer_types"] = [
            "full_attention" if i % 4 == 3 or i == last else "sliding_attention"
            for i in range(last + 1)
        ]
    config["num_hidden_layers"] = len(config["layer_types"])
    # transformers 5.11 reads no rope_parameters that hold a kind without layers
    kinds, ropes = config["layer_types"], config["rope_parameters"]
    config["rope_parameters"] = {kind: ropes[kind] for kind in ropes if kind in kinds}
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": canvas_length,
        "dtype": dtype,
        "boi_token_id": IMAGE_START,
        "eoi_token_id": IMAGE_END,
        "image_token_id": IMAGE,
        "eos_token_id": [EOS, TURN_END],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "vision_soft_tokens_per_image": 280,
        "text_config": config | {"dtype": dtype},
        "vision_config": VISION | vision | {"dtype": dtype},
    }


def generation_config(canvas_length: int, steps: int) -> dict:
    """Return generation_config.json: the release's sampler, at most `steps` steps."""
    return {
        "confidence_threshold": 0.005,
        "eos_token_id": [EOS, TURN_END],
        "max_denoising_steps": steps,
        "max_new_tokens": canvas_length,
        "pad_token_id": PAD,
        "sampler_config": {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": 0.1,
        },
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
    }


def write_files(
    path: Path,
    config: dict,
    *,
    layout: str = "release",
    text_only: bool = False,
    steps: int = 48,
) -> None:
    """Write all files of a checkpoint but its weights to the folder `path`.

    `config` is in the release's layout; config.json has `layout`. `text_only` leaves
    out the vision tower. `steps` is the limit of generation_config.json.
    """
    if layout == "transformers":
        from transformers import DiffusionGemmaConfig

        DiffusionGemmaConfig.from_dict(config).save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
    if text_only:
        config = {key: value for key, value in config.items() if key != "vision_config"}
    build_tokenizer().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, document in (
        ("config.json", config),
        ("generation_config.json", generation_config(config["canvas_length"], steps)),
        ("tokenizer_config.json", TOKENIZER),
    ):
        (path / name).write_text(json.dumps(document, indent=2) + "\n")
