"""Prompt cache files: a prefix comes back bit for bit; everything else is refused."""

import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly
from mlx.utils import tree_flatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.adapters.lora import LoRA, adapt
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.prefix import Prefix
from mlx_dgemma.diffusion.prompt_cache import (
    fingerprint,
    load_prefix,
    save_prefix,
)
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files.safetensors import checksum

LOOSE = {"steps": 2, "entropy_bound": 8.0, "confidence": 2.0, "prefill_step_size": 32}
SAID = ["ab" * 30, "c" * 9, "12" * 20]


def conversation(model, tokenizer, turns=3) -> Conversation:
    talk = Conversation(model, tokenizer, system="abc" * 15, **LOOSE)
    for turn, content in enumerate(SAID[:turns]):
        list(talk.ask(content, seed=turn))
    return talk


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A conversation, and the file of its prefix; do not write to either."""
    talk = conversation(*tiny_model)
    path = tmp_path_factory.mktemp("saved") / "talk.safetensors"
    save_prefix(path, talk.prefix)
    return talk, path


def same_arrays(one, other) -> None:
    for (_, a), (_, b) in zip(tree_flatten(one), tree_flatten(other), strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))


def test_prefix_comes_back_bit_for_bit(tiny_model, saved):
    """Loaded in another thread than the one that uses it."""
    model, (talk, path) = tiny_model[0], saved
    with ThreadPoolExecutor(1) as pool:
        prefix = pool.submit(load_prefix, path, model).result()
    assert (prefix.keys, prefix.ends) == (talk.prefix.keys, talk.prefix.ends)
    before, after = talk.prefix.cache, prefix.cache
    assert after.length == len(prefix)
    for bucketed in (False, True):
        views = [model.view(c, 16, bucketed=bucketed) for c in (before, after)]
        same_arrays(*views)
    for a, b in zip(before.snapshots, after.snapshots, strict=True):
        assert a.column == b.column
        same_arrays(a.windows, b.windows)
    after.rewind(after.snapshots[0].column)
    fresh, canvas = model.make_cache(), mx.array([[5] * 16])
    for start, end in pairwise([0, *(e for e in prefix.ends if e <= after.length)]):
        model.encode(mx.array([prefix.keys[start:end]]), fresh)
    same_arrays(model.denoise(canvas, after), model.denoise(canvas, fresh))


def test_conversation_goes_on_where_it_was_saved(tiny_model, saved):
    for turns in (3, 1):  # from its end, and from its middle
        here, there = (conversation(*tiny_model, turns) for _ in range(2))
        there.load(saved[1])
        expected, found = (exactly(t.ask("34", seed=9)) for t in (here, there))
        assert found == expected
        assert there.stats is not None and there.stats.reused > 32


def test_keys_of_pictures_come_back(tiny_model, tmp_path):
    """Negative numbers of any size."""
    prefix, path = Prefix(tiny_model[0]), tmp_path / "a.safetensors"
    tiny_model[0].encode(mx.array([[2, 7, 3, 3, 3, 8]]), prefix.cache)
    prefix.extend([2, 7, -1, -(2**63), -(2**119) - 5, 8], last=True)
    save_prefix(path, prefix)
    assert load_prefix(path, tiny_model[0]).keys == prefix.keys


def test_model_of_full_layers_alone_has_a_cache_file_too(tmp_path):
    layers = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    model, tokenizer = load(write_tiny(tmp_path / "m", **layers))
    talk = conversation(model, tokenizer)
    talk.save(tmp_path / "a.safetensors")
    talk.load(tmp_path / "a.safetensors")
    list(talk.ask("12", seed=0))
    assert talk.stats is not None and talk.stats.reused > 64


def test_file_is_replaced_whole_or_not_at_all(tiny_model, saved, tmp_path):
    model, talk, path = tiny_model[0], saved[0], tmp_path / "a.cache"
    for _ in range(2):
        save_prefix(path, talk.prefix)
    assert load_prefix(path, model).keys == talk.prefix.keys
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", tmp_path / "none" / "a.cache"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_prefix(target, talk.prefix)
    with pytest.raises(CheckpointError, match="nothing is encoded yet"):
        save_prefix(path, Prefix(model))
    assert {file.name for file in tmp_path.iterdir()} == {"a.cache", "folder"}


def test_damaged_files_are_refused(tiny, tiny_model, saved, tmp_path):
    model, _ = tiny_model
    whole, path = saved[1].read_bytes(), tmp_path / "a.safetensors"
    contents = [whole[:size] for size in (0, 5, 100, len(whole) // 2, len(whole) - 1)]
    for content in (*contents, b"\xff" * 4000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged, or not a .*; delete it"):
            load_prefix(path, model)
    with pytest.raises(CheckpointError, match="no such file"):
        load_prefix(tmp_path / "none.safetensors", model)
    with pytest.raises(CheckpointError, match="not a prompt cache; give another"):
        load_prefix(tiny / "model.safetensors", model)


def _set(name, value, dtype=np.int64):
    return lambda a: a.__setitem__(name, mx.array(np.array(value, dtype)))


def _drop(start):
    """Of all arrays whose name starts so, the first."""
    return lambda a: a.pop(min(name for name in a if name.startswith(start)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("keys", [[0, 1]]), "ends are not those of chunks of the keys"),
        (_set("keys", np.zeros((0, 2))), "ends are not those of chunks"),
        (_set("ends", []), "ends are not those of chunks"),
        (_set("ends", [0, 5]), "ends are not those of chunks"),
        (_set("ends", [[1]]), "keys or ends are missing or of a wrong kind"),
        (_set("keys", [1], np.int32), "keys or ends are missing or of a wrong kind"),
        (_drop("keys"), "keys or ends are missing or of a wrong kind"),
        (lambda a: a["keys"].__setitem__((3, 1), 32), "holds id 32, which the model"),
        (_set("full.0.0", 0.0), "full.0.0 has sh"),
        (_drop("full.1.1"), "missing tensors: full.1.1"),
        (_drop("sliding.1.1."), r"missing tensors: sliding.1.1."),
        (_set("sliding.0.0.5", [0]), "unexpected tensors: sliding.0.0.5"),
    ],
)
def test_inconsistent_arrays_are_refused(tiny_model, saved, tmp_path, change, message):
    arrays, metadata = mx.load(str(saved[1]), return_metadata=True)
    change(arrays)
    path = tmp_path / "a.safetensors"
    metadata["arrays"] = checksum(arrays)
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(CheckpointError, match=f"{message}.*; delete it and save it"):
        load_prefix(path, tiny_model[0])


def test_any_changed_number_is_noticed(tiny_model, saved, tmp_path):
    path, data = tmp_path / "a.safetensors", bytearray(saved[1].read_bytes())
    for at in range(len(data) - 1, len(data) // 2, -len(data) // 40):
        changed = bytearray(data)
        changed[at] ^= 4
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged; delete it"):
            load_prefix(path, tiny_model[0])


def test_a_file_is_for_its_owner_alone(saved):
    assert stat.S_IMODE(saved[1].stat().st_mode) == 0o600


def test_files_of_other_kinds_and_models_are_refused(tiny_model, saved, tmp_path):
    arrays, metadata = mx.load(str(saved[1]), return_metadata=True)
    path = tmp_path / "a.safetensors"
    for changes, message in (
        ({"kind": "other"}, "not a prompt cache; give another file"),
        ({"layout": "1"}, "of layout '1', but this version reads '2'; delete it"),
        ({"arrays": "0" * 64}, "damaged; delete it and save it again"),
        ({"model": "0" * 64}, "encoded by another model, or with another adapter"),
    ):
        mx.save_safetensors(str(path), arrays, metadata | changes)
        with pytest.raises(CheckpointError, match=message):
            load_prefix(path, tiny_model[0])


def test_fingerprints_differ_between_models(tiny, tiny_model, tmp_path):
    expected = fingerprint(tiny_model[0])
    model, _ = load(tiny)
    model.eval()
    assert fingerprint(model) == expected
    found = {expected}
    for number, other in enumerate(({"seed": 1}, {"sliding_window": 9})):
        found.add(fingerprint(load(write_tiny(tmp_path / str(number), **other))[0]))
    # one number of one matrix of one layer; two numbers that change places
    matrix = model.layers[1].self_attn.k_proj.weight
    for changed in (mx.array(matrix), mx.array(matrix)):
        changed[3, 4] = changed[3, 5] if len(found) > 3 else 1e-3
        changed[3, 5] = matrix[3, 4] if len(found) > 3 else matrix[3, 5]
        model.layers[1].self_attn.k_proj.weight = changed
        found.add(fingerprint(model))
    for scale in (1.0, 2.0):
        model, _ = load(tiny)
        adapt(model, LoRA(rank=2, scale=scale))
        model.freeze()
        found.add(fingerprint(model))
    assert len(found) == 7
