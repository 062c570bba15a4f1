"""Everything this package refuses, as one tree a caller can catch.

    DGemmaError
    ├── ConfigError        a configuration file says something impossible
    ├── CheckpointError    a weight file, its index or a tensor is missing or wrong
    ├── ConversionError    a conversion that was refused or could not be finished
    ├── TokenizerError     tokenizer files or the chat template are missing or broken
    ├── SettingsError      a generation setting is unknown or out of range
    └── HubError           a model could not be found or fetched

Each message is one line: what is wrong, where, and how to mend it. Commands print
that line alone and exit with 1.
"""


class DGemmaError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(DGemmaError):
    """A configuration file holds an impossible or unsupported value."""


class CheckpointError(DGemmaError):
    """A weight file, its index or one of its tensors is missing, torn or wrong."""


class ConversionError(DGemmaError):
    """A conversion was refused, or could not be finished."""


class TokenizerError(DGemmaError):
    """Tokenizer files or the chat template are missing or broken."""


class SettingsError(DGemmaError, ValueError):
    """A generation setting is unknown or out of its range."""


class HubError(DGemmaError):
    """A model could not be found or fetched."""
