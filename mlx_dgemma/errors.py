"""Everything this package refuses, as classes a caller can catch.

Each message is one line: what is wrong, where, and how to fix it. Commands print
that line alone and exit with 1.
"""

LONGEST = 600  # characters


class DGemmaError(Exception):
    """Base of every error raised on purpose by this package.

    A message may quote what a file holds: it is made one line, and cut in its middle
    where it is too long.
    """

    def __init__(self, message: str = ""):
        super().__init__(shortened(" ".join(message.splitlines())))


def shortened(line: str) -> str:
    """Return the line, without its middle where it is too long to be read.

    Lone surrogates are escaped: no stream can print them.
    """
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - 200]} … {line[-200:]}"


class ConfigError(DGemmaError):
    """A configuration file holds an impossible or unsupported value."""


class CheckpointError(DGemmaError):
    """A weight file, its index or one of its tensors is missing or invalid."""


class ConversionError(DGemmaError):
    """A conversion was refused, or could not be finished."""


class TokenizerError(DGemmaError):
    """Tokenizer files or the chat template are missing or invalid."""


class SettingsError(DGemmaError, ValueError):
    """A setting is unknown or out of its range."""


class NumericError(DGemmaError):
    """A weight, a logit or a loss is NaN or infinite."""


class BackendError(DGemmaError):
    """The requested device cannot be used here."""


class DataError(DGemmaError):
    """A row of training or evaluation data is invalid."""


class TrainingError(DGemmaError):
    """A fine-tuning was refused, or cannot go on."""


class AdapterError(DGemmaError):
    """An adapter is invalid, or does not fit the model."""


class MediaError(DGemmaError):
    """A picture or a video is refused, damaged or of an unknown kind."""


class HubError(DGemmaError):
    """A model could not be found or fetched."""


class SlowBlasWarning(UserWarning):
    """MLX computes on a CPU with a BLAS that is far slower than OpenBLAS."""
