"""Everything this package refuses, as one tree a caller can catch.

    DGemmaError
    ├── ConfigError        a configuration file says something impossible
    ├── CheckpointError    a weight file, its index or a tensor is missing or wrong
    ├── ConversionError    a conversion that was refused or could not be finished
    ├── TokenizerError     tokenizer files or the chat template are missing or broken
    ├── SettingsError      a setting is unknown or out of range
    ├── BackendError       the device asked for cannot be used here
    ├── DataError          a row of training or evaluation data is broken
    ├── TrainingError      a fine-tuning that was refused or cannot go on
    ├── AdapterError       an adapter is broken, or does not fit the model
    ├── MediaError         a picture or a video is refused, broken or of no known kind
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
    """A setting is unknown or out of its range."""


class BackendError(DGemmaError):
    """The device asked for cannot be used here."""


class DataError(DGemmaError):
    """A row of training or evaluation data is broken."""


class TrainingError(DGemmaError):
    """A fine-tuning was refused, or cannot go on."""


class AdapterError(DGemmaError):
    """An adapter is broken, or does not fit the model."""


class MediaError(DGemmaError):
    """A picture or a video is refused, broken or of no known kind."""


class HubError(DGemmaError):
    """A model could not be found or fetched."""


class SlowBlasWarning(UserWarning):
    """MLX computes on a CPU with a BLAS that is far slower than OpenBLAS."""
