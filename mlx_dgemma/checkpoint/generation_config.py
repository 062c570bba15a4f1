"""Sampler settings of a checkpoint, from generation_config.json."""

from pathlib import Path

from ..errors import ConfigError
from ..files.json import Keys, read_json
from ..settings import MAX_COUNT, MAX_TOKEN, Settings
from .config import ModelConfig, warn_of_unknown

SAMPLER = "EntropyBoundSamplerConfig"
# Keys of transformers that change nothing here: caches and output formats.
IGNORED_KEYS = frozenset(
    "bos_token_id pad_token_id transformers_version max_length "
    "return_dict_in_generate cache_implementation cache_config disable_compile "
    "_from_model_config _commit_hash".split()
)


def read_generation_config(config: ModelConfig, folder: Path | None = None) -> Settings:
    """Return the sampler settings a checkpoint declares, defaults where it is silent.

    Reads generation_config.json of the folder, or else the copy of it that mlx-vlm
    puts into config.json. Raises ConfigError naming the file and the key.
    """
    where = "config.json" if folder is None else str(folder / "config.json")
    top, vocab_size = Keys(config.raw, where), config.vocab_size
    text = top.mapping("text_config")
    eos = top.ids("eos_token_id", vocab_size)
    if not eos and text is not None:
        eos = text.ids("eos_token_id", vocab_size)
    defaults = Settings(canvas_length=config.canvas_length, eos=frozenset(eos or (1,)))
    keys = top.mapping("generation_config")
    if folder is not None and (path := folder / "generation_config.json").exists():
        keys = Keys(read_json(path), str(path))
    if keys is None:
        return defaults
    bound = defaults.entropy_bound
    if sampler := keys.mapping("sampler_config"):
        sampler.one_of("_cls_name", SAMPLER, (SAMPLER,))
        bound = sampler.number("entropy_bound", bound)
        sampler.refuse_unknown("is no setting of this sampler")
    eos = keys.ids("eos_token_id", vocab_size)
    stability, confidence = defaults.stability, defaults.confidence
    try:
        settings = defaults.replace(
            max_tokens=keys.integer(
                "max_new_tokens", defaults.max_tokens, 1, MAX_TOKEN
            ),
            steps=keys.integer("max_denoising_steps", defaults.steps, 1, MAX_COUNT),
            entropy_bound=bound,
            t_max=keys.number("t_max", defaults.t_max),
            t_min=keys.number("t_min", defaults.t_min, zero=True),
            stability=keys.integer("stability_threshold", stability, 0, MAX_COUNT),
            confidence=keys.number("confidence_threshold", confidence, zero=True),
            eos=frozenset(eos) if eos else None,
        )
    except ValueError as error:
        raise ConfigError(f"{keys.where}: {error}") from None
    warn_of_unknown(keys.where, keys.unknown(IGNORED_KEYS))
    return settings
