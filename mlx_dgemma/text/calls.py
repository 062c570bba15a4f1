"""The text of a call to the tool's name and its arguments.

    call:name{key:<|"|>text<|"|>,n:3,on:true,none:null,list:[1,2],object:{a:1}}

Keys are bare or quoted, white space may stand between the parts, and JSON's own
strings are read too. So is a call that is one JSON object, {"name": …, "arguments": …}.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

QUOTE = "\udc22"  # stands for a quote token: no decoded text holds a lone surrogate
QUOTES = (QUOTE, '<|"|>')
MAX_DEPTH = 64
MAX_NUMBER = 400  # characters; longer ones are no use, and slow to read
NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")

WORDS = {"true": True, "false": False, "null": None, "None": None}
SPACE = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r"[A-Za-z]+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
BARE_KEY = re.compile(r'[^:,{}\[\]"\udc22]+')
HALF = re.compile(r"[\ud800-\udfff]")  # of a character; QUOTE is one
JSON = json.JSONDecoder(strict=False)  # line breaks may stand in a string


class BrokenCallError(ValueError):
    """A call that cannot be read; the message says where and why."""


def read_call(body: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call; in `body` quote tokens are QUOTE.

    Raises BrokenCallError. Time is linear in the length of `body`.
    """
    begin = len(body) - len(body.lstrip())
    if body.startswith("{", begin):
        return _from_object(_Arguments(body, begin).read())
    if not body.startswith("call:", begin):
        raise BrokenCallError('it begins with neither "call:" nor "{"')
    brace = body.find("{", begin)
    if brace < 0:
        raise BrokenCallError("it has no arguments in {}")
    name = body[begin + len("call:") : brace].strip()
    return _checked(name), _Arguments(body, brace).read()


def shown(body: str) -> str:
    """The text of a call for people: quote tokens as plain quotes."""
    return body.replace(QUOTE, '"')


def _from_object(call: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise BrokenCallError("its arguments are not an object")
    return _checked(call.get("name", "")), arguments


def _checked(name: Any) -> str:
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise BrokenCallError("it has no name" if not name else "its name is not one")
    return name


class _Arguments:
    """A recursive descent over `text` from `at` on."""

    def __init__(self, text: str, at: int):
        self._text = text
        self._at = at

    def read(self) -> dict[str, Any]:
        """The object that begins here and ends the text."""
        arguments = self._object(1)
        self._skip()
        if self._at < len(self._text):
            self._refuse("something follows its arguments")
        return arguments

    def _value(self, depth: int) -> Any:
        self._skip()
        if self._sees("{"):
            return self._object(depth + 1)
        if self._sees("["):
            return self._list(depth + 1)
        if self._is_quoted():
            return self._quoted()
        if word := WORD.match(self._text, self._at):
            if word[0] not in WORDS:
                self._refuse("neither a value nor a quoted text")
            self._at = word.end()
            return WORDS[word[0]]
        return self._number()

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def item() -> None:
            self._skip()
            begin, key = self._at, self._key()
            if key in found:
                self._at = begin
                self._refuse("a key stands twice")
            self._skip()
            if not self._passes(":"):
                self._refuse('":" is missing')
            found[key] = self._value(depth)

        self._items("}", depth, item)
        return found

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self._items("]", depth, lambda: found.append(self._value(depth)))
        return found

    def _items(self, end: str, depth: int, item: Callable[[], None]) -> None:
        """From the bracket here to its `end`, with items between commas."""
        if depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        self._at += 1
        self._skip()
        if self._passes(end):
            return
        while True:
            item()
            self._skip()
            if self._passes(end):
                return
            if not self._passes(","):
                self._refuse(f'"," or "{end}" is missing')

    def _key(self) -> str:
        if self._is_quoted():
            return self._quoted()
        key = BARE_KEY.match(self._text, self._at)
        if key is None:
            self._refuse("a key is missing")
        self._at = key.end()
        return key[0].rstrip()

    def _is_quoted(self) -> bool:
        return self._text.startswith((*QUOTES, '"'), self._at)

    def _quoted(self) -> str:
        """A text, up to another of the quotes it begins with."""
        begin = self._at
        if self._sees('"'):
            try:
                value, self._at = JSON.raw_decode(self._text, begin)
            except ValueError:
                self._refuse("a text does not end, or holds a wrong escape")
        else:
            quote = next(q for q in QUOTES if self._sees(q))
            end = self._text.find(quote, begin + len(quote))
            if end < 0:
                self._refuse("a text does not end")
            value, self._at = self._text[begin + len(quote) : end], end + len(quote)
        if HALF.search(value):
            self._at = begin
            self._refuse("a text holds a quote of another kind or half a character")
        return value

    def _number(self) -> int | float:
        found = NUMBER.match(self._text, self._at)
        if found is None:
            self._refuse("a value is missing")
        if len(found[0]) > MAX_NUMBER:
            self._refuse("a number is too long")
        whole = found[1] is None and found[2] is None
        number = int(found[0]) if whole else float(found[0])
        if number in (math.inf, -math.inf):
            self._refuse("a number is too large")
        self._at = found.end()
        return number

    def _skip(self) -> None:
        space = SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _sees(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _passes(self, text: str) -> bool:
        seen = self._sees(text)
        self._at += len(text) * seen
        return seen

    def _refuse(self, why: str) -> NoReturn:
        raise BrokenCallError(f"character {self._at}: {why}")
