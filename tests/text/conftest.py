import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy_tokenizers import FAST, NAMES, train_sentencepiece, write

from mlx_dgemma.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder for each kind of tokenizer."""
    found = {}
    for name, build in FAST.items():
        found[name] = tmp_path_factory.mktemp(name)
        build().save(str(found[name] / "tokenizer.json"))
    for name in NAMES[-2:]:
        found[name] = tmp_path_factory.mktemp(name)
        train_sentencepiece(found[name], dummy_prefix=name == "sentencepiece")
    for folder in found.values():
        write(folder, "tokenizer_config.json", {"bos_token": "<bos>"})
    return found


@pytest.fixture(scope="session")
def loaded(folders) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_dir(folder) for name, folder in folders.items()}


@pytest.fixture
def clock():
    """Fails when its block takes longer than so many seconds."""

    @contextmanager
    def within(seconds: float):
        started = time.process_time()
        yield
        assert time.process_time() - started < seconds

    return within
