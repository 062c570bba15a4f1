"""From a name to a model and its tokenizer: what most programs call first."""

from pathlib import Path

from .adapters import folder as adapters
from .checkpoint import hub
from .checkpoint.config import read_config
from .checkpoint.weights import read_layout
from .model.language import DiffusionGemma
from .model.loading import join_products, load_model
from .performance.cost import Storage
from .performance.estimate import check_fits
from .text.tokenizer import Tokenizer


def load(
    path_or_id: str | Path,
    adapter_path: str | Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
) -> tuple[DiffusionGemma, Tokenizer]:
    """Return a model and its tokenizer from a folder, a hub id or a built-in name.

    adapter_path    a folder written by `mlx_dgemma.lora`, or by PEFT; the adapter is
                    put beside the weights
    force           load also what this device has too little memory for

    Every weight is in memory when this returns, so the model may be used from any
    thread; not by a process forked from this one, which is refused. Raises DGemmaError
    with one line that says what is wrong.
    """
    model, tokenizer = load_as_stored(path_or_id, revision=revision, force=force)
    if adapter_path is not None:
        adapters.load(model, adapter_path)
    join_products(model)
    return model, tokenizer


def load_as_stored(
    path_or_id: str | Path, *, revision: str | None = None, force: bool = False
) -> tuple[DiffusionGemma, Tokenizer]:
    """`load` for training: every layer under its name on disk, on every device."""
    folder = hub.resolve(path_or_id, revision)
    config = read_config(folder)
    if not force:
        check_fits(config, Storage.of_files(read_layout(folder, config).parameters))
    tokenizer = Tokenizer.from_dir(folder)
    return load_model(folder, config), tokenizer
