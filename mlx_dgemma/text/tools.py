"""Tools as OpenAI's JSON declares them, and what they answered.

    {"type": "function", "function": {"name", "description", "parameters"}}

Only what a chat template relies on is checked; arguments are not compared with the
schema of their tool.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import SettingsError
from .calls import MAX_DEPTH, NAME

MAX_TOOLS = 128
MAX_CHARS = 2**18  # of all tools together, as JSON
TOOL_SHAPE = 'it must be {"type": "function", "function": {…}}'
CALLS_SHAPE = 'tool_calls must be a list of {"id", "function": {…}}'


def require(holds: bool, message: str) -> None:
    """Raise SettingsError with `message` unless a condition holds."""
    if not holds:
        raise SettingsError(message)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools as chat templates want them: each with a description.

    Raises SettingsError naming the tool.
    """
    kind = type(tools).__name__
    require(isinstance(tools, list | tuple), f"tools is {kind}; it must be a list")
    count = len(tools)
    require(count <= MAX_TOOLS, f"{count} tools are too many; at most {MAX_TOOLS}")
    checked: dict[str, dict[str, Any]] = {}
    for i, padded in enumerate(tools):
        check_json(padded, f"tool {i}")
        tool = without_nulls(padded)
        function = _check_function(tool, f"tool {i}")
        name = function["name"]
        twice = f"tool {i}: there are two called {name!r}; rename one"
        require(name not in checked, twice)
        checked[name] = {**tool, "function": function}
    result = list(checked.values())
    size = len(json.dumps(result, default=dict))
    require(size <= MAX_CHARS, f"tools take {size} characters; at most {MAX_CHARS}")
    return result


def without_nulls(value: Any) -> Any:
    """Return a JSON value without null members, with which tables pad their rows."""
    if isinstance(value, Mapping):
        return {
            key: item if key in ("default", "const", "enum") else without_nulls(item)
            for key, item in value.items()
            if item is not None or key in ("default", "const")
        }
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _check_function(tool: Any, where: str) -> dict[str, Any]:
    """Return what a template reads of a tool: a name, a description, a schema."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise SettingsError(f"{where}: {TOOL_SHAPE}")
    name, description = function.get("name"), function.get("description")
    shape = "letters, digits and _ . / - make one, up to 128"
    require(_is_name(name), f"{where}: name is {name!r:.60}; {shape}")
    kind = type(description).__name__
    wrong = f"{where}: description is {kind}; it must be text"
    require(isinstance(description, str | None), wrong)
    function = {**function, "description": description or ""}
    parameters = function.pop("parameters", None)
    if parameters:
        if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
            raise SettingsError(
                f'{where}: parameters must be a JSON schema with "type": "object"'
            )
        _check_schema(parameters, f"{where}: parameters")
        function["parameters"] = parameters
    return function


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _check_schema(schema: Any, where: str) -> None:
    """Refuse a schema that templates cannot go through."""
    require(isinstance(schema, Mapping), f"{where} must be an object")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    require(isinstance(properties, Mapping), f"{where}.properties must be an object")
    names = isinstance(required, list | tuple)
    names = names and all(isinstance(name, str) for name in required)
    require(names, f"{where}.required must be a list of names")
    for name in required if properties else []:
        unknown = f"{where}.required names {name!r:.60}, not a property"
        require(name in properties, unknown)
    for name, inner in properties.items():
        _check_schema(inner, f"{where}.{name}")
    if isinstance(schema.get("items"), Mapping):
        _check_schema(schema["items"], f"{where}.items")


def check_json(value: Any, where: str, depth: int = 1) -> None:
    """Refuse what is not JSON, and what is nested too deeply. Raises SettingsError."""
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float) and abs(value) < float("inf"):
        return
    if not isinstance(value, Mapping | list | tuple):
        raise SettingsError(f"{where}: {value!r:.60} is not JSON")
    require(depth <= MAX_DEPTH, f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key in value:
            require(isinstance(key, str), f"{where}: the key {key!r:.60} is not text")
        value = value.values()
    for item in value:
        check_json(item, where, depth + 1)


def link_tool_results(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with every tool's result named after its tool.

    A tool's message belongs to a call of the assistant's message before it, found by
    its "tool_call_id", or names the tool itself. Arguments of calls written as JSON
    text become objects. Raises SettingsError naming the message.
    """
    result = []
    calls: dict[str, str | None] | None = None  # id -> tool of the latest calls
    for index, message in enumerate(messages):
        where = f"message {index}"
        message = dict(message)
        if message["role"] == "assistant" and message.get("tool_calls"):
            made = _read_calls(message["tool_calls"], where)
            message["tool_calls"] = made
            calls = {c["id"]: c["function"].get("name") for c in made if c.get("id")}
        elif message["role"] != "tool":
            calls = None
        elif calls is None:
            raise SettingsError(f"{where}: no call of a tool stands before it")
        else:
            message["name"] = _tool_name(message, calls, where)
        result.append(message)
    return result


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant's message, their arguments as objects."""
    result = []
    for call in calls if isinstance(calls, list | tuple) else [None]:
        call = call if isinstance(call, Mapping) else {}
        function, call_id = call.get("function"), call.get("id")
        if not isinstance(function, Mapping) or not isinstance(call_id, str | None):
            raise SettingsError(f"{where}: {CALLS_SHAPE}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as OpenAI's API sends them; empty for none
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
            wrong = f"{where}: the arguments of a call are not a JSON object"
            require(isinstance(arguments, dict), wrong)
            function = {**function, "arguments": arguments}
        check_json(arguments, where)
        result.append({**call, "function": function})
    return result


def _tool_name(
    message: Mapping[str, Any], calls: Mapping[str, str | None], where: str
) -> str:
    """Return the name of the tool whose result a message is."""
    name, call_id = message.get("name"), message.get("tool_call_id")
    if call_id is not None and calls:
        if not isinstance(call_id, str) or call_id not in calls:
            raise SettingsError(
                f"{where}: tool_call_id is {call_id!r:.60}; no call before it has it"
            )
        called = calls[call_id]
        other = f"{where}: name is {name!r:.60}, but its call is of {called!r}"
        require(None in (name, called) or name == called, other)
        name = called if name is None else name
    if not isinstance(name, str) or not _is_name(name):
        raise SettingsError(
            f"{where}: name is {name!r:.60}; give the tool's, or its id"
        )
    return name
