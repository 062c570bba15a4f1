"""What a user of mlx-lm writes works here too; strict type checkers agree."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma import Conversation, generate, load, stream_generate
from mlx_dgemma.errors import SettingsError

PACKAGE = Path(mlx_dgemma.__file__).parent
MESSAGES = [{"role": "user", "content": "4000\n0310\n0430\n0000"}]


def test_the_snippet_of_mlx_lm_works(capsys):
    model, tokenizer = load("sudoku4")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    text = generate(model, tokenizer, prompt=prompt, verbose=True)
    assert text in capsys.readouterr().out
    responses = stream_generate(model, tokenizer, prompt, max_tokens=512)
    streamed = "".join(response.text for response in responses)
    assert len(streamed.split()) == len(text.split()) == 4


def test_every_form_of_a_prompt_is_put_into_the_template_once():
    model, tokenizer = load("sudoku4")
    options = {"add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(MESSAGES, **options)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
    forms = MESSAGES, MESSAGES[0]["content"], ids, rendered
    texts = {
        generate(model, tokenizer, prompt, seed=1)
        for prompt in (*forms, np.array(ids), mx.array(ids))
    }
    assert len(texts) == 1


def test_final_message_can_be_continued(tiny_model):
    """The text is only what is new."""
    asked, begun = messages = [*MESSAGES, {"role": "assistant", "content": "ab"}]
    continued, options = {"continue_final_message": True}, {"max_tokens": 16}
    ids = tiny_model[1].apply_chat_template(messages, **continued)
    expected = generate(*tiny_model, ids, seed=0, **options)
    found = generate(*tiny_model, messages, seed=0, **continued, **options)
    talk = Conversation(*tiny_model, chat_template_kwargs={"x": "1"}, **options)
    talk.add(asked)
    talk.add(begun)
    events = list(talk.ask(seed=0, **continued))
    assert found == "".join(event.text for event in events) == expected
    assert talk.messages == [asked, begun | {"content": "ab" + expected}]
    with pytest.raises(SettingsError, match="chat_template_kwargs cannot set messages"):
        generate(*tiny_model, "a", chat_template_kwargs={"messages": []})


@pytest.mark.slow
def test_a_program_with_strict_types_can_use_the_package(tmp_path):
    """The package as it is installed: in the site-packages of an environment."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "venv" / "lib" / version / "site-packages"
    shutil.copytree(PACKAGE, site / "mlx_dgemma")
    assert (site / "mlx_dgemma" / "py.typed").exists()
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shutil.copy(Path(__file__).with_name("consumer.py"), tmp_path)
    config = {"venvPath": ".", "venv": "venv", "include": ["consumer.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--project", "."]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
