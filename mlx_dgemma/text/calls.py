"""The text of a call to the tool's name and its arguments.

    call:name{key:<|"|>text<|"|>,n:3,on:true,none:null,list:[1,2],object:{a:1}}

Keys are bare or quoted, white space may stand between the parts, and strings in JSON's
quotes or in single ones are read too. So are a call that is one JSON object, {"name",
"arguments"} or {"function": {…}}, and one as Python writes it, name(key="text"). No
argument that was written is left out: what is not understood is refused.
"""

import json
import math
import re
from typing import Any, NoReturn

QUOTE = "\udc22"  # stands for a quote token: no decoded text holds a lone surrogate
QUOTES = (QUOTE, '<|"|>', '"', "'")
MAX_DEPTH = 64
MAX_NUMBER = 400  # characters; longer numbers are slow to read
NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")

WORDS = {"true": True, "false": False, "null": None, "None": None}
WORDS |= {"True": True, "False": False}
SPACE = re.compile(r"[ \t\r\n]+")
WORD_OR_NUMBER = re.compile(
    r"[A-Za-z]+|(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
)
BARE_KEYS = {
    ":": re.compile(r"""[^:,{}\[\]"\udc22]+"""),
    "=": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"),
}
BRACKETS = {"{": "}", "[": "]", "(": ")"}
ARGUMENTS = ("arguments", "parameters", "args")
PYTHON_CALL = re.compile(
    r"\s*(?:call:)?\s*([A-Za-z0-9_./-]{1,128})\s*(\(.*\))\s*", re.S
)
SURROGATE = re.compile(r"[\ud800-\udfff]")
SINGLE = re.compile(r"'((?:[^'\\]|\\.)*)'", re.S)
ESCAPE = re.compile(r"\\(.)", re.S)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
JSON = json.JSONDecoder(strict=False)  # line breaks may stand in a string


class BrokenCallError(ValueError):
    """A call that cannot be read; the message says where and why."""


def read_call(body: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call; in `body` quote tokens are QUOTE.

    Raises BrokenCallError. Time is linear in the length of `body`.
    """
    begin = len(body) - len(body.lstrip())
    brace = body.find("{", begin)
    if brace == begin:
        name, arguments = _read_json_call(_Parser(body, brace).parse())
    elif python := PYTHON_CALL.fullmatch(body):
        name, arguments = python[1], _Parser(body, python.start(2)).parse()
    elif not body.startswith("call:", begin):
        raise BrokenCallError('it begins with neither "call:" nor "{"')
    elif brace < 0:
        raise BrokenCallError("it has no arguments in {}")
    else:
        name = body[begin + len("call:") : brace].strip()
        arguments = _Parser(body, brace).parse()
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise BrokenCallError("its name is not one" if name else "it has no name")
    return name, arguments


def _read_json_call(call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return name and arguments of a call that is one object."""
    if isinstance(inner := call.get("function"), dict):
        call = inner | {k: v for k, v in call.items() if k != "function"}
    elif isinstance(inner, str) and "name" not in call:
        call = {"name": inner} | {k: v for k, v in call.items() if k != "function"}
    given = [key for key in ARGUMENTS if key in call]
    if strange := sorted(call.keys() - {"name", "id", "type", *ARGUMENTS}):
        raise BrokenCallError(f"it has {strange[0]!r:.60} beside name and arguments")
    if len(given) > 1:
        raise BrokenCallError("it has arguments twice")
    arguments = call[given[0]] if given else {}
    if isinstance(arguments, str):  # as OpenAI's API writes them
        arguments = _Parser(arguments, 0).parse() if arguments.startswith("{") else None
    if not isinstance(arguments, dict):
        raise BrokenCallError("its arguments are not an object")
    return call.get("name", ""), arguments


class _Parser:
    """A recursive descent over `text` from `at` on."""

    def __init__(self, text: str, at: int):
        self._text, self._at, self._colon = text, at, ":"

    def parse(self) -> dict[str, Any]:
        """Return the object that begins here and ends the text."""
        arguments = self._collection(1)
        self._skip_space()
        if self._at < len(self._text):
            self._refuse("something follows its arguments")
        return arguments

    def _value(self, depth: int) -> Any:
        self._skip_space()
        if self._text.startswith(("{", "["), self._at):
            return self._collection(depth + 1)
        if (string := self._string()) is not None:
            return string
        found = WORD_OR_NUMBER.match(self._text, self._at)
        if found is None:
            self._refuse("a value is missing")
        word, number = found[0], found[1]
        if number is None and word not in WORDS:
            self._refuse("neither a value nor a quoted text")
        if number is not None and len(number) > MAX_NUMBER:
            self._refuse("a number is too long")
        value = WORDS[word] if number is None else json.loads(number)
        if value in (math.inf, -math.inf):
            self._refuse("a number is too large")
        self._at = found.end()
        return value

    def _collection(self, depth: int) -> Any:
        """Return an object or a list, from its bracket on; (…) is an object too."""
        if depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        end = BRACKETS[self._text[self._at]]
        is_object, self._colon = end != "]", "=" if end == ")" else ":"
        self._at += 1
        members: dict[Any, Any] = {}  # of a list, by index
        while not self._passes(end):
            if members and not self._passes(","):
                self._refuse(f'"," or "{end}" is missing')
            colon = self._colon
            key = self._key(members) if is_object else len(members)
            members[key] = self._value(depth)
            self._colon = colon
        return members if is_object else list(members.values())

    def _key(self, members: dict[Any, Any]) -> str:
        """Return the key before the next ":", which no member has yet."""
        self._skip_space()
        begin, key = self._at, None
        # a bare key may begin with a single quote
        single = SINGLE.match(self._text, begin)
        space = single and SPACE.match(self._text, single.end())
        after = space or single
        quoted = after and self._text.startswith(self._colon, after.end())
        if quoted or not self._text.startswith("'", begin):
            key = self._string()
        if key is None:
            found = BARE_KEYS[self._colon].match(self._text, begin)
            if found is None:
                self._refuse("a key is missing")
            key, self._at = found[0].rstrip(), found.end()
        if key in members:
            self._refuse("a key stands twice", begin)
        if not self._passes(self._colon):
            self._refuse(f'"{self._colon}" is missing')
        return key

    def _string(self) -> str | None:
        """Return the quoted text that begins here, None if no quote does."""
        begin = self._at
        quote = next((q for q in QUOTES if self._text.startswith(q, begin)), None)
        if quote is None:
            return None
        if quote == '"':
            try:
                value, self._at = JSON.raw_decode(self._text, begin)
            except ValueError:
                self._refuse("a text does not end, or holds a wrong escape")
        elif quote == "'":
            found = SINGLE.match(self._text, begin)
            if found is None:
                self._refuse("a text does not end")
            value = ESCAPE.sub(lambda m: ESCAPED.get(m[1], m[1]), found[1])
            self._at = found.end()
        else:
            end = self._text.find(quote, begin + len(quote))
            if end < 0:
                self._refuse("a text does not end")
            value, self._at = self._text[begin + len(quote) : end], end + len(quote)
        if SURROGATE.search(value):
            why = "a text holds a quote of another kind or half a character"
            self._refuse(why, begin)
        return value

    def _skip_space(self) -> None:
        if space := SPACE.match(self._text, self._at):
            self._at = space.end()

    def _passes(self, sign: str) -> bool:
        """Whether `sign` comes next; if so, step over it."""
        self._skip_space()
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) * found
        return found

    def _refuse(self, why: str, at: int | None = None) -> NoReturn:
        where = self._at if at is None else at
        raise BrokenCallError(f"character {where}: {why}")
