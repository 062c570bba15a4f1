"""Prompt cache files: a prefix comes back bit for bit; everything else is refused."""

import stat
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly
from tiny import write_tiny

from mlx_dgemma import Conversation, LoRA, Prefix, load
from mlx_dgemma.adapters.lora import adapt
from mlx_dgemma.diffusion.prefix import fingerprint, load_prefix, save_prefix
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


def test_conversation_goes_on_where_it_was_saved(tiny_model, saved):
    for turns in (3, 2, 1):  # bit for bit, from its end and its middle
        here, there = (conversation(*tiny_model, turns) for _ in range(2))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(there.load, saved[1]).result()
        columns = [s.column for s in there.prefix.cache.snapshots]
        assert columns == [s.column for s in saved[0].prefix.cache.snapshots]
        expected, found = (exactly(t.ask("34", seed=9)) for t in (here, there))
        assert found == expected
        assert there.stats is not None and there.stats.reused > 32


def test_keys_of_pictures_come_back(tiny_model, tmp_path):
    """Negative numbers of any size."""
    prefix, path = Prefix(tiny_model[0]), tmp_path / "a.safetensors"
    tiny_model[0].encode(mx.array([[2, 7, 3, 3, 3, 8]]), prefix.cache)
    prefix.extend([2, 7, -1, -(2**63), -(2**119) - 5, 8], snapshot=False)
    save_prefix(path, prefix)
    assert load_prefix(path, tiny_model[0]).keys == prefix.keys


def test_model_of_full_layers_alone_has_a_cache_file_too(tmp_path):
    layers = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    talk = conversation(*load(write_tiny(tmp_path / "m", **layers)))
    talk.save(tmp_path / "a.safetensors")
    talk.load(tmp_path / "a.safetensors")
    list(talk.ask("12", seed=0))
    assert talk.stats is not None and talk.stats.reused > 64


def test_file_is_replaced_whole_or_not_at_all(tiny_model, saved, tmp_path):
    prefix, path = saved[0].prefix, tmp_path / "a.cache"
    for _ in range(2):
        save_prefix(path, prefix)
    assert load_prefix(path, tiny_model[0]).keys == prefix.keys
    for target, kept, message in (
        (tmp_path, prefix, "cannot be written"),
        (tmp_path / "none" / "a.cache", prefix, "cannot be written"),
        (path, Prefix(tiny_model[0]), "nothing is encoded yet"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_prefix(target, kept)
    assert [file.name for file in tmp_path.iterdir()] == ["a.cache"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it holds what was said


def _set(name, value, dtype=np.int64):
    return lambda a, _: a.__setitem__(name, mx.array(np.array(value, dtype)))


def _drop(start):
    """Of all arrays whose name starts so, the first."""
    return lambda a, _: a.pop(min(name for name in a if name.startswith(start)))


def _say(**metadata):
    return lambda _, m: m.update(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("keys", np.zeros((0, 2))), "ends are not those of .* keys; delete it"),
        (_set("ends", []), "ends are not those of chunks"),
        (_set("ends", [0, 5]), "ends are not those of chunks"),
        (_set("ends", [[1]]), "keys or ends are missing or of a wrong kind; delete it"),
        (_set("keys", [1], np.int32), "keys or ends are missing or of a wrong kind"),
        (_drop("keys"), "keys or ends are missing or of a wrong kind"),
        (lambda a, _: a["keys"].__setitem__((3, 1), 32), "holds id 32, which the mod"),
        (_set("full.0.0", 0.0), "full.0.0 has sh"),
        (_drop("full.1.1"), "missing tensors: full.1.1"),
        (_drop("sliding.1.1."), r"missing tensors: sliding.1.1."),
        (_set("sliding.0.0.5", [0]), "unexpected tensors: sliding.0.0.5; delete it"),
        (_say(kind="other"), "not a prompt cache; give another file"),
        (_say(layout="1"), "of layout '1', but this version reads '2'; delete it"),
        (_say(model="0"), "encoded by another model, or with another adapter"),
    ],
)
def test_files_of_others_and_with_wrong_arrays_are_refused(
    tiny_model, saved, tmp_path, change, message
):
    arrays, metadata = mx.load(str(saved[1]), return_metadata=True)
    change(arrays, metadata)
    metadata["arrays"] = checksum(arrays)
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(CheckpointError, match=message):
        load_prefix(path, tiny_model[0])


def test_damaged_files_are_refused(tiny_model, saved, tmp_path):
    whole, path = saved[1].read_bytes(), tmp_path / "a.safetensors"
    contents = [whole[:size] for size in (0, 5, 100, len(whole) // 2, len(whole) - 1)]
    for at in range(len(whole) - 1, len(whole) // 2, -len(whole) // 40):
        contents.append(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    for content in (*contents, b"\xff" * 4000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged.*; delete it and save it"):
            load_prefix(path, tiny_model[0])
    with pytest.raises(CheckpointError, match="no such file"):
        load_prefix(tmp_path / "none.safetensors", tiny_model[0])


def test_fingerprints_differ_between_models(tiny, tiny_model, tmp_path):
    model, found = load(tiny)[0], {fingerprint(tiny_model[0])}
    model.eval()
    assert {fingerprint(model)} == found
    # of one matrix of one layer one number, or two numbers that change places
    layer, others = model.layers[1].self_attn.k_proj, []
    a, b = layer.weight[3, 4:6].tolist()
    for numbers in ([1e-3, b], [b, a]):
        layer.weight[3, 4:6] = mx.array(numbers)
        found.add(fingerprint(model))
    for number, other in enumerate(({"seed": 1}, {"sliding_window": 9})):
        others.append(load(write_tiny(tmp_path / str(number), **other))[0])
    for scale in (1.0, 2.0):
        model, _ = load(tiny)
        adapt(model, LoRA(rank=2, scale=scale))
        model.freeze()
        others.append(model)
    assert len(found.union(map(fingerprint, others))) == 7
