"""Prompt cache files: a prefix comes back bit for bit, and nothing else comes back."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Step
from mlx_dgemma.diffusion.prefix import Prefix
from mlx_dgemma.diffusion.prompt_cache import fingerprint, load_prefix, save_prefix
from mlx_dgemma.errors import CheckpointError, SettingsError

LOOSE = {"steps": 3, "entropy_bound": 8.0, "confidence": 2.0, "prefill_step_size": 32}
SAID = ["ab" * 30, "c" * 9, "12" * 20, "5"]


def talked(model, tokenizer, turns=3) -> Conversation:
    talk = Conversation(model, tokenizer, system="abc" * 15, **LOOSE)
    for turn, content in enumerate(SAID[:turns]):
        list(talk.ask(content, seed=turn))
    return talk


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A conversation, and the file of its prefix; do not write to either."""
    talk = talked(*tiny_model)
    path = tmp_path_factory.mktemp("saved") / "talk.safetensors"
    save_prefix(path, talk.prefix)
    return talk, path


def test_a_prefix_comes_back_bit_for_bit(tiny_model, saved):
    model, _ = tiny_model
    talk, path = saved
    prefix = load_prefix(path, model)
    assert (prefix.keys, prefix.ends) == (talk.prefix.keys, talk.prefix.ends)
    assert prefix.cache.length == len(prefix)
    before, after = talk.prefix.cache, prefix.cache
    assert [m.column for m in before.snapshots] == [m.column for m in after.snapshots]
    # a view of both, with room and without, holds the same numbers
    for bucketed in (False, True):
        views = [model.view(c, 16, bucketed=bucketed).arrays for c in (before, after)]
        for (_, a), (_, b) in zip(*map(tree_flatten, views), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    for a, b in zip(before.snapshots, after.snapshots, strict=True):
        for x, y in zip(tree_flatten(a.windows), tree_flatten(b.windows), strict=True):
            np.testing.assert_array_equal(np.array(x[1]), np.array(y[1]))


def test_a_conversation_goes_on_where_it_was_saved(tiny_model, saved):
    model, tokenizer = tiny_model
    _, path = saved
    for turns in (3, 1):  # from its end, and from its middle
        here = talked(model, tokenizer, turns)
        there = talked(model, tokenizer, turns)
        there.prefix = load_prefix(path, model)
        wanted = [e for e in here.ask("34", seed=9) if isinstance(e, Step)]
        found = [e for e in there.ask("34", seed=9) if isinstance(e, Step)]
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(np.array(a.entropy), np.array(b.entropy))
        assert there.stats is not None and there.stats.reused > 32
        assert here.messages == there.messages


def test_pictures_are_keys_too(tiny_model, tmp_path):
    """Numbers below 0, of any size."""
    model, _ = tiny_model
    keys, path = [2, 7, -1, -(2**63), -(2**119) - 5, 8], tmp_path / "a.safetensors"
    prefix = Prefix(model)
    prefix.fill(
        keys, [3, 6], lambda a, b: model.encode(mx.array([[1, 2, 3]]), prefix.cache)
    )
    save_prefix(path, prefix)
    assert load_prefix(path, model).keys == keys


def test_nothing_but_the_file_is_left(tiny_model, saved, tmp_path):
    talk, _ = saved
    path = tmp_path / "again.cache"
    for _ in range(2):
        save_prefix(path, talk.prefix)
        assert [file.name for file in tmp_path.iterdir()] == ["again.cache"]
    assert load_prefix(path, tiny_model[0]).keys == talk.prefix.keys
    path.unlink()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder.safetensors: cannot be written"):
        save_prefix(tmp_path / "folder.safetensors", talk.prefix)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.safetensors"]


def test_what_cannot_be_saved_is_refused(tiny_model, saved, tmp_path):
    model, _ = tiny_model
    talk, _ = saved
    with pytest.raises(CheckpointError, match="nothing is encoded yet"):
        save_prefix(tmp_path / "a.safetensors", Prefix(model))
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_prefix(tmp_path / "none" / "a.safetensors", talk.prefix)
    prefix, engine = Prefix(model), Engine(model)
    engine.admit([2, 3, 4], model.settings, 0, prefix=prefix)
    with pytest.raises(SettingsError, match="a running request writes"):
        save_prefix(tmp_path / "a.safetensors", prefix)
    assert list(tmp_path.iterdir()) == []


def changed(path, target, *, header=None, metadata=None, size=None):
    """A copy of a prompt cache with another header, metadata or length."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    if metadata is not None:
        entries["__metadata__"].update(metadata)
    if header is not None:
        header(entries)
    text = json.dumps(entries).encode()
    target.write_bytes(
        (struct.pack("<Q", len(text)) + text + data[8 + length :])[:size]
    )
    return target


def _without(name):
    return lambda entries: entries.pop(name)


def _renamed(old, new):
    return lambda entries: entries.__setitem__(new, entries.pop(old))


def _shaped(name, shape):
    return lambda entries: entries[name].__setitem__("shape", shape)


def test_a_torn_file_is_refused(tiny_model, saved, tmp_path):
    model, _ = tiny_model
    whole = saved[1].read_bytes()
    path = tmp_path / "torn.safetensors"
    for size in [0, 5, 8, 100, 2000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match="torn, or no safetensors file; delete"
        ):
            load_prefix(path, model)
    path.write_bytes(b"\xff" * 4000)
    with pytest.raises(CheckpointError, match="torn, or no safetensors file"):
        load_prefix(path, model)
    for entry in (5, ["a"], {"a": 1}, {"a": {"b": "c"}}):
        broken = changed(
            saved[1], path, header=lambda e, entry=entry: e.update(__metadata__=entry)
        )
        with pytest.raises(CheckpointError, match=r"torn, or no|is no prompt cache"):
            load_prefix(broken, model)
    with pytest.raises(CheckpointError, match="no such file"):
        load_prefix(tmp_path / "none.safetensors", model)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "other"}, "is no prompt cache; give another file"),
        ({"layout": "2"}, "of layout '2', but this version reads '1'; delete it"),
        ({"model": "0" * 64}, "encoded by another model, or with another adapter"),
    ],
)
def test_what_is_of_another_kind_is_refused(
    tiny_model, saved, tmp_path, metadata, message
):
    other = changed(saved[1], tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_prefix(other, tiny_model[0])


def test_weights_are_no_prompt_cache(tiny, tiny_model):
    with pytest.raises(CheckpointError, match="is no prompt cache"):
        load_prefix(tiny / "model.safetensors", tiny_model[0])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_without("keys"), "keys or ends are not the numbers"),
        (_without("ends"), "keys or ends are not the numbers"),
        (_without("full.0.0"), "lacks full.0.0"),
        (_renamed("full.0.0", "full.7.0"), "lacks full.0.0"),
        (_renamed("full.1.1", "full.1.2"), "lacks full.1.1"),
        (lambda e: e.update(more=e["full.0.0"]), "overlap|torn"),
        (_shaped("full.0.0", [1, 1, -1, 4]), "torn"),
    ],
)
def test_what_cannot_be_is_refused(tiny_model, saved, tmp_path, header, message):
    other = changed(saved[1], tmp_path / "a.safetensors", header=header)
    with pytest.raises(CheckpointError, match=message):
        load_prefix(other, tiny_model[0])


def rewritten(saved, target, change):
    """A copy of a prompt cache whose arrays were changed."""
    arrays, metadata = mx.load(str(saved[1]), return_metadata=True)
    change(arrays)
    mx.save_safetensors(str(target), arrays, metadata)
    return target


def _set(name, value, dtype=np.int64):
    return lambda a: a.__setitem__(name, mx.array(np.array(value, dtype)))


def _cast(name):
    return lambda a: a.__setitem__(name, a[name].astype(mx.float16))


def _cut(name):
    return lambda a: a.__setitem__(name, a[name][:, :, 1:])


def _drop_mark(a):
    """One layer's part of one mark."""
    name = next(n for n in sorted(a) if n.startswith("sliding.1.1."))
    del a[name]


def _stray_mark(a):
    a["sliding.0.0.5"] = a.pop(
        next(n for n in sorted(a) if n.startswith("sliding.0.0"))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("keys", [[0, 1]]), "ends are not those of chunks of the keys"),
        (_set("ends", []), "ends are not those of chunks"),
        (_set("ends", [0, 5]), "ends are not those of chunks"),
        (_set("ends", [-1]), "ends are not those of chunks"),
        (_set("ends", [[1]]), "keys or ends are not the numbers"),
        (_set("keys", [1], np.int32), "keys or ends are not the numbers"),
        (_set("keys", np.zeros((0, 2))), "ends are not those of chunks"),
        (lambda a: a["keys"].__setitem__((3, 1), 32), "holds id 32, which the model"),
        (_cast("full.0.0"), r"full.0.0 holds mlx.core.float16"),
        (_cut("full.0.0"), r"full.0.0 holds mlx.core.float32 \[1, 1, "),
        (_cut("full.1.0"), r"full.1.0 holds"),
        (_drop_mark, "lacks sliding.1.1."),
        (_stray_mark, "lacks sliding.0.0.|'sliding.0.0.5' is no part"),
        (lambda a: a.update(more=mx.zeros(3)), "'more' is no part of this model's"),
    ],
)
def test_impossible_arrays_are_refused(tiny_model, saved, tmp_path, change, message):
    other = rewritten(saved, tmp_path / "a.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_prefix(other, tiny_model[0])


def test_fingerprints_tell_models_apart(tiny, tiny_model, tmp_path):
    from mlx_dgemma.adapters.lora import LoRA, adapt

    known = fingerprint(tiny_model[0])
    again, _ = load(tiny)
    assert fingerprint(again) == known
    found = {known}
    others = {"seed": 1}, {"sliding_window": 9}
    for number, other in enumerate(others):
        model, _ = load(write_tiny(tmp_path / str(number), **other))
        found.add(fingerprint(model))
    # one number in two hundred of one matrix of one layer
    matrix = again.layers[1].self_attn.k_proj.weight
    noise = mx.where(mx.arange(matrix.size) % 200 == 120, 1e-3, 0).reshape(matrix.shape)
    again.layers[1].self_attn.k_proj.weight = matrix + noise
    found.add(fingerprint(again))
    for scale in (1.0, 2.0):
        model, _ = load(tiny)
        adapt(model, LoRA(rank=2, scale=scale))
        model.freeze()
        found.add(fingerprint(model))
    assert len(found) == 6
    model, _ = load(tiny)
    model.eval()
    assert fingerprint(model) == known


def test_a_prefix_of_another_checkpoint_of_the_same_shape_is_refused(saved, tmp_path):
    model, _ = load(write_tiny(tmp_path / "m", seed=1))
    with pytest.raises(CheckpointError, match="encoded by another model"):
        load_prefix(saved[1], model)


def test_a_model_of_full_layers_alone_has_a_cache_file_too(tmp_path):
    kinds = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    model, tokenizer = load(write_tiny(tmp_path / "m", **kinds))
    talk = talked(model, tokenizer)
    save_prefix(tmp_path / "a.safetensors", talk.prefix)
    talk.prefix = load_prefix(tmp_path / "a.safetensors", model)
    list(talk.ask("12", seed=0))
    assert talk.stats is not None and talk.stats.reused > 64


def test_it_may_be_read_in_one_thread_and_used_in_another(tiny_model, saved):
    from concurrent.futures import ThreadPoolExecutor

    model, _ = tiny_model
    for mark in range(4):
        with ThreadPoolExecutor(1) as pool:
            prefix = pool.submit(load_prefix, saved[1], model).result()
        column = prefix.cache.snapshots[mark].column
        prefix.cache.rewind(column)
        fresh, start = model.make_cache(), 0
        for end in [end for end in prefix.ends if end <= column]:
            model.encode(mx.array([prefix.keys[start:end]]), fresh)
            start = end
        canvas = mx.array([[5] * 16])
        np.testing.assert_array_equal(
            np.array(model.denoise(canvas, prefix.cache)),
            np.array(model.denoise(canvas, fresh)),
        )
