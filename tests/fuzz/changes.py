"""Random changes of files: bytes, words of their format, values of their JSON."""

import json
import random
import struct
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 63, 64, 2**16, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.0]
NUMBERS += [1e308, float("nan"), float("inf"), -1e-300, 3.0]
WORDS: list[Any] = ["", "x", " ", "a" * 3000, "\ud83d\ude00", "\ud800", "é\0", "../x"]
WORDS += ["[" * 300, "(a+)+$", "(", "\\p{L}", "<|turn>", "{{ x }}", "/dev/zero", "1"]
WORDS += ["affine", "Replace", "BPE", "Precompiled", "Regex", "Sequence", "AAAA"]
VALUES: list[Any] = [*NUMBERS, *WORDS, None, True, False, [], {}, [[]], {"a": []}]
TEMPLATES = [
    "{% for a in range(9**9) %}{% for b in range(9**9) %}x{% endfor %}{% endfor %}",
    "{{ 9**(9**9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a' * 10**6] * 10**6 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ [].append }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns }}",
    "{{ messages | map('upper') | list }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ messages | tojson(indent=99999999) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ lipsum(n=10000000) }}",
    "{% include 'x' %}",
    "{{ raise_exception(messages) }}",
    "{{ undefined.a.b }}",
    "{{ messages | sort | sum }}",
    "{{ messages | batch(0) | list }}",
    "{{ 'x' | center(999999999) }}",
    "{{ 'a,b' | replace('', 'x' * 9999999) }}",
    "{% generation %}{% endgeneration %}",
    "{{ strftime_now('%Y' * 9999999) }}",
    "{{ (1,) * 99999999 }}",
    "{{ dict(a=1) | dictsort | groupby('x') | list }}",
    "{{ cycler() }}{{ joiner(1)() }}",
    "{{ 1 // 0 }}",
    "{{ 1 | round(10**9) }}",
    "{{ '\\ud800' }}",
]
YAML = [
    "!!python/object/apply:os.system ['true']\n",
    "a: &a [*a, *a]\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c,*c,*c]\n",
    "iters: 0x" + "f" * 6000 + "\n",
    "iters: 1" + "0" * 6000 + "\n",
    "? [a]\n: b\n",
    "<<: 3\n",
    "rank: 2026-99-99\n",
    "rank: 2026-12-01 25:61:61\n",
    "rank: !!float x\n",
    "rank: !!int ''\n",
    "rank: !!binary '%%'\n",
    "rank: !!set {a, b}\n",
    "rank: !!timestamp 'x'\n",
    "%YAML 9.9\n---\n",
    "---\na: 1\n---\nb: 2\n",
    "a: {" * 2000,
    "rank: .inf\n",
    "rank: 190:20:30\n",
    "\x01: 1\n",
]
JINJA = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "-%}",
    "|",
    "(",
    ")",
    "[",
    "]",
    "'",
    "not ",
    "in ",
]
JINJA += [
    "messages",
    "loop",
    " if ",
    " else ",
    "endfor",
    "endif",
    "set ",
    ".",
    "**",
    "~",
]


def changed(name: str, data: bytes, rng: random.Random) -> bytes:
    """Return a file's bytes with one or a few changes that fit its name."""
    kind = rng.random()
    if kind < 0.02:
        return b""
    if kind < 0.35:
        return bytes_changed(data, rng)
    if name.endswith(".json"):
        return json_changed(data, rng)
    if name.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = json_changed(lines[at], rng) + b"\n"
        return b"".join(lines)
    if name.endswith(".safetensors"):
        length = struct.unpack("<Q", data[:8])[0]
        text, rest = data[8 : 8 + length], data[8 + length :]
        if rng.random() < 0.5:
            return data[: 8 + length] + numbers_changed(rest, rng)
        text = json_changed(text, rng)
        return struct.pack("<Q", len(text)) + text + rest
    if name.endswith(".jinja"):
        return text_changed(data, [*TEMPLATES, *TEMPLATES, *JINJA], rng)
    if name.endswith(".yaml"):
        return text_changed(data, [*YAML, *map(str, NUMBERS)], rng)
    return numbers_changed(data, rng)


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some replaced, inserted, deleted, doubled, or cut off."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(new) + 1)
        match rng.randrange(5):
            case 0:
                new[at : at + 1] = rng.randbytes(1)
            case 1:
                new[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
            case 2:
                del new[at : at + rng.choice([1, 4, 1000])]
            case 3:
                new[at:at] = new[max(0, at - rng.choice([1, 9, 5000])) : at]
            case _ if rng.random() < 0.3:
                del new[at:]
    return bytes(new)


def numbers_changed(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few numbers of 1 to 8 bytes replaced by extreme ones."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        size = rng.choice([1, 2, 4, 8])
        value = rng.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 255, 4096])
        value %= 2 ** (8 * size)
        at = rng.randrange(max(1, len(new)))
        new[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))
    if size == 4 and rng.random() < 0.3:
        special = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38]))
        new[at : at + 4] = special
    return bytes(new)


def text_changed(data: bytes, pieces: list[str], rng: random.Random) -> bytes:
    """Return a text with one of these pieces put in, or in place of some of it."""
    text = data.decode("utf-8", "replace")
    at = rng.choice([0, len(text), rng.randrange(len(text) + 1)])
    gone = rng.choice([0, 0, 1, 9, len(text)])
    new = text[:at] + rng.choice(pieces) + text[at + gone :]
    return new.encode("utf-8", "surrogatepass")


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with values, keys or its nesting changed."""
    document = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        document = value_changed(document, rng)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.03:
        deep = rng.choice([900, 100_000])
        text = text[:-1] + ', "deep": ' + "[" * deep + "]" * deep + "}"
    if rng.random() < 0.03:
        text = text.replace("1", "1" + "0" * rng.choice([400, 5000]), 1)
    return text.encode("utf-8", "surrogatepass")


def value_changed(value: Any, rng: random.Random) -> Any:
    """Return a value with one thing inside it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {str(rng.choice(WORDS)): rng.choice(VALUES)}
            case 2:
                return value | {key: value[rng.choice([*value])]}
            case _:
                return value | {key: value_changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value * rng.choice([2, 50])
            case _:
                return [*value[:at], value_changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice([-1, 1, 2])
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["x", "", "é", " ", "\0", "("]) + value[at + 1 :]
    return rng.choice(VALUES)
