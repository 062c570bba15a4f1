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


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools as chat templates want them: each with a description.

    Raises SettingsError naming the tool.
    """
    if not isinstance(tools, list | tuple):
        raise SettingsError(f"tools is {type(tools).__name__}; it must be a list")
    if len(tools) > MAX_TOOLS:
        raise SettingsError(f"{len(tools)} tools are too many; at most {MAX_TOOLS}")
    checked = [_check_tool(tool, f"tool {i}") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise SettingsError(f"tool {i}: there are two called {name!r}; rename one")
    size = len(json.dumps(checked, default=dict))
    if size > MAX_CHARS:
        raise SettingsError(f"tools take {size} characters; at most {MAX_CHARS}")
    return checked


def _check_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise SettingsError(f"{where}: {TOOL_SHAPE}")
    check_json(tool, where)
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise SettingsError(f"{where}: {TOOL_SHAPE}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise SettingsError(
            f"{where}: name is {name!r:.60}; letters, digits and _ . / - make one, "
            "up to 128"
        )
    if not isinstance(description, str | None):
        kind = type(description).__name__
        raise SettingsError(f"{where}: description is {kind}; it must be text")
    function = {**function, "description": description or ""}
    parameters = function.get("parameters")
    if not parameters:  # a tool that takes none
        function.pop("parameters", None)
    elif not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise SettingsError(
            f'{where}: parameters must be a JSON schema with "type": "object"'
        )
    else:
        _check_schema(parameters, f"{where}: parameters")
    return {**tool, "function": function}


def _check_schema(schema: Any, where: str) -> None:
    """Refuse a schema that templates cannot go through."""
    if not isinstance(schema, Mapping):
        raise SettingsError(f"{where} must be an object")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise SettingsError(f"{where}.properties must be an object")
    required = schema.get("required", [])
    if not isinstance(required, list | tuple) or not all(
        isinstance(name, str) for name in required
    ):
        raise SettingsError(f"{where}.required must be a list of names")
    for name in required:
        if properties and name not in properties:
            raise SettingsError(f"{where}.required names {name!r:.60}, not a property")
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
    if depth > MAX_DEPTH:
        raise SettingsError(f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SettingsError(f"{where}: the key {key!r:.60} is not text")
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
    """The calls of an assistant's message, their arguments as objects."""
    if not isinstance(calls, list | tuple):
        raise SettingsError(f"{where}: {CALLS_SHAPE}")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(
            call.get("id"), str | None
        ):
            raise SettingsError(f"{where}: {CALLS_SHAPE}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as OpenAI's API sends them; empty for none
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise SettingsError(
                    f"{where}: the arguments of a call are not a JSON object"
                )
            function = {**function, "arguments": arguments}
        check_json(arguments, where)
        result.append({**call, "function": function})
    return result


def _tool_name(
    message: Mapping[str, Any], calls: Mapping[str, str | None], where: str
) -> str:
    """The name of the tool whose result a message is."""
    name, call_id = message.get("name"), message.get("tool_call_id")
    if call_id is not None and calls:
        if not isinstance(call_id, str) or call_id not in calls:
            raise SettingsError(
                f"{where}: tool_call_id is {call_id!r:.60}; no call before it has it"
            )
        called = calls[call_id]
        if name is not None and called is not None and name != called:
            raise SettingsError(
                f"{where}: name is {name!r:.60}, but its call is of {called!r}"
            )
        name = called if name is None else name
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise SettingsError(
            f"{where}: name is {name!r:.60}; give the tool's, or its id"
        )
    return name
