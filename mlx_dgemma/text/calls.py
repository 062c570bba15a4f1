"""The text of a call to the tool's name and its arguments.

    call:name{key:<|"|>text<|"|>,n:3,on:true,none:null,list:[1,2],object:{a:1}}

Keys are bare or quoted, white space may stand between the parts, and JSON's own
strings are read too. So is a call that is one JSON object, {"name": …, "arguments": …}.
"""

import json
import math
import re
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
SURROGATE = re.compile(r"[\ud800-\udfff]")
JSON = json.JSONDecoder(strict=False)  # line breaks may stand in a string


class BrokenCallError(ValueError):
    """A call that cannot be read; the message says where and why."""


def read_call(body: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call; in `body` quote tokens are QUOTE.

    Raises BrokenCallError. Time is linear in the length of `body`.
    """
    begin = len(body) - len(body.lstrip())
    if body.startswith("{", begin):
        call = _Parser(body, begin).parse()
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            raise BrokenCallError("its arguments are not an object")
        return _checked(call.get("name", "")), arguments
    if not body.startswith("call:", begin):
        raise BrokenCallError('it begins with neither "call:" nor "{"')
    brace = body.find("{", begin)
    if brace < 0:
        raise BrokenCallError("it has no arguments in {}")
    name = _checked(body[begin + len("call:") : brace].strip())
    return name, _Parser(body, brace).parse()


def _checked(name: Any) -> str:
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise BrokenCallError("its name is not one" if name else "it has no name")
    return name


class _Parser:
    """A recursive descent over `text` from `at` on."""

    def __init__(self, text: str, at: int):
        self._text, self._at = text, at

    def parse(self) -> dict[str, Any]:
        """The object that begins here and ends the text."""
        arguments = self._collection(1)
        self._skip_space()
        if self._at < len(self._text):
            self._refuse("something follows its arguments")
        return arguments

    def _value(self, depth: int) -> Any:
        self._skip_space()
        if self._text.startswith(("{", "["), self._at):
            return self._collection(depth + 1)
        if self._at_quote():
            return self._quoted()
        word = WORD.match(self._text, self._at)
        if word is None:
            return self._number()
        if word[0] not in WORDS:
            self._refuse("neither a value nor a quoted text")
        self._at = word.end()
        return WORDS[word[0]]

    def _collection(self, depth: int) -> Any:
        """An object or a list, from its bracket on."""
        if depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        members, items = dict[str, Any](), list[Any]()
        is_object = self._text[self._at] == "{"
        end = "}" if is_object else "]"
        self._at += 1
        while not self._passes(end):
            if (members or items) and not self._passes(","):
                self._refuse(f'"," or "{end}" is missing')
            if not is_object:
                items.append(self._value(depth))
                continue
            self._skip_space()
            begin, key = self._at, self._key()
            if key in members:
                self._refuse("a key stands twice", begin)
            if not self._passes(":"):
                self._refuse('":" is missing')
            members[key] = self._value(depth)
        return members if is_object else items

    def _key(self) -> str:
        if self._at_quote():
            return self._quoted()
        key = BARE_KEY.match(self._text, self._at)
        if key is None:
            self._refuse("a key is missing")
        self._at = key.end()
        return key[0].rstrip()

    def _at_quote(self) -> bool:
        return self._text.startswith((*QUOTES, '"'), self._at)

    def _quoted(self) -> str:
        """A text, up to the kind of quote with which it begins."""
        begin = self._at
        if self._text.startswith('"', begin):
            try:
                value, self._at = JSON.raw_decode(self._text, begin)
            except ValueError:
                self._refuse("a text does not end, or holds a wrong escape")
        else:
            quote = next(q for q in QUOTES if self._text.startswith(q, begin))
            end = self._text.find(quote, begin + len(quote))
            if end < 0:
                self._refuse("a text does not end")
            value, self._at = self._text[begin + len(quote) : end], end + len(quote)
        if SURROGATE.search(value):
            why = "a text holds a quote of another kind or half a character"
            self._refuse(why, begin)
        return value

    def _number(self) -> int | float:
        found = NUMBER.match(self._text, self._at)
        if found is None:
            self._refuse("a value is missing")
        if len(found[0]) > MAX_NUMBER:
            self._refuse("a number is too long")
        is_int = found[1] is None and found[2] is None
        number = int(found[0]) if is_int else float(found[0])
        if number in (math.inf, -math.inf):
            self._refuse("a number is too large")
        self._at = found.end()
        return number

    def _skip_space(self) -> None:
        space = SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _passes(self, sign: str) -> bool:
        """Whether `sign` comes next; it is then behind us."""
        self._skip_space()
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) * found
        return found

    def _refuse(self, why: str, at: int | None = None) -> NoReturn:
        where = self._at if at is None else at
        raise BrokenCallError(f"character {where}: {why}")
