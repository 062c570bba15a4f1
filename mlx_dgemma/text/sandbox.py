"""Where chat templates run: jinja2's sandbox, with limits on work and on output.

Set up as transformers sets it up, but for the limits, and that nothing of a template is
computed while it is compiled. Imported when a template is used.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cache, wraps
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 2**25  # characters of one text
MAX_NUMBER = 2**20  # of an argument that may say a width or a count
MAX_INDENT = 16  # of JSON
MAX_STEPS = 2_000_000  # rounds of loops and calls of macros
MAX_SECONDS = 5.0
WIDTH = re.compile(r"\d{7,}")  # in a format
# filters that make more than they are given
MAKING = frozenset("center indent truncate wordwrap batch slice replace".split())
# filters that make one text of what they are given
WRITING = frozenset("capitalize e escape forceescape format join lower pprint".split())
WRITING |= frozenset(
    "string striptags title tojson trim upper urlencode urlize".split()
)
WRITING |= frozenset("wordcount xmlattr".split()) | MAKING - {"batch", "slice"}
BINARY = frozenset(["+", "-", "*", "/", "//", "%", "**"])


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps, self.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0 or time.monotonic() > self.deadline:
            raise SecurityError("it does not end")


_budget: ContextVar[Budget] = ContextVar("budget")


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the text of a template. Raises SecurityError beyond a limit."""
    token = _budget.set(Budget())
    try:
        return _join(template.generate(variables))
    finally:
        _budget.reset(token)


def compile_template(source: str) -> jinja2.Template:
    """Return a template whose loops, macros and joined texts are counted."""
    environment = sandbox()
    tree = Counted().visit(environment.parse(source))
    code = environment.compile(tree.set_environment(environment))
    return jinja2.Template.from_code(environment, code, dict(environment.globals))


class Counted(NodeTransformer):
    """Has rounds of loops, calls of macros and `a ~ b` go through the environment."""

    def visit_Concat(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._call("join_texts", node.nodes, node.lineno)

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(self._call("spend", [], node.lineno))
        node.body.insert(0, step.set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def _call(self, name: str, arguments: list[nodes.Expr], line: int) -> Any:
        function = nodes.EnvironmentAttribute(name)
        return nodes.Call(function, arguments, [], None, None).set_lineno(line)


class NoFolding(CodeGenerator):
    """Compiles without computing: jinja2 folds what is constant, however large."""

    def _output_child_to_const(
        self, node: nodes.Expr, frame: Any, finalize: Any
    ) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of every template."""

    code_generator_class = NoFolding
    intercepted_binops = BINARY

    def spend(self) -> str:
        """Count one round of a loop, or call of a macro."""
        _budget.get().spend()
        return ""

    def join_texts(self, *values: Any) -> str:
        _check_text(values)
        texts = [str(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "+", _, _:
                _check_size(_size(left) + _size(right))
            case ("*", int(), int()) | ("*", float(), _) | ("*", _, float()):
                _check_size(_size(left) + _size(right))
            case "*", _, int():
                _check_size(_size(left) * right)
            case "*", int(), _:
                _check_size(_size(right) * left)
            case "**", int(), int():
                _check_size(_size(left) * max(right, 0))
            case "%", str(), _:
                _check_format(left)
                _check_text(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, BuiltinMethodType):  # of a text or a list
            _check_arguments(obj.__self__, [*args, *kwargs.values()])
        return _checked(super().call(context, obj, *args, **kwargs))


def _size(value: Any) -> int:
    """Return the length of a text or list, the bits of a whole number."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 0


def _join(pieces: Iterable[str]) -> str:
    """Return the pieces as one text that is not too long."""
    made, size = [], 0
    for piece in pieces:
        made.append(piece)
        size += len(piece)
        _check_size(size)
    return "".join(made)


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes more than {MAX_TEXT:,} characters")


def _check_text(value: Any) -> None:
    """Refuse what is too long as text; lists may hold one long text many times."""
    size, parts = 0, [value]
    while parts:
        part = parts.pop()
        _budget.get().spend()
        if isinstance(part, Mapping):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, Collection) and not isinstance(part, str):
            parts += part
        size += 1 + (len(part) if isinstance(part, Collection) else 0)
        _check_size(size)


def _check_output(value: Any) -> Any:
    _check_text(value)
    return value


def _check_format(text: str) -> None:
    if WIDTH.search(text):
        raise SecurityError("a format holds a width that is too large")


def _check_arguments(owner: Any, arguments: Iterable[Any]) -> None:
    """Refuse numbers that may be widths, and texts that may be put in many times."""
    for argument in arguments:
        if isinstance(argument, int):
            if argument > MAX_NUMBER:
                raise SecurityError(f"{argument} is too large a number here")
            if isinstance(owner, str):  # of each line, or each tab, if of more than one
                _check_size(argument * (1 + owner.count("\n") + owner.count("\t")))
        if isinstance(owner, str) and isinstance(argument, str):
            _check_size(len(owner) * len(argument))
        if isinstance(owner, str):
            _check_text(argument)


def _checked(value: Any) -> Any:
    _check_size(_size(value))
    return value


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses what would make too much."""

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if name in WRITING:
            _check_text(args)
        if name in MAKING:
            texts = [value for value in args if isinstance(value, str)]
            _check_arguments(texts[0] if texts else None, [*args, *kwargs.values()])
        return _checked(function(*args, **kwargs))

    return limited


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as `json.dumps` writes it: jinja2's own filter escapes HTML."""
    indent = options.get("indent")
    if (indent if isinstance(indent, int) else len(indent or "")) > MAX_INDENT:
        raise SecurityError(f"tojson indents by more than {MAX_INDENT}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, **options)
    return _join(encoder.iterencode(value))


class Generation(Extension):
    """`{% generation %}` marks a trained span; its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block keeps variables set inside from leaking out.
        call = self.call_method("render_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def render_body(self, caller: Any) -> str:
        return caller()


class PlainNamespace(Namespace):
    """A namespace that refuses names with a leading underscore, and shows none."""

    def __init__(*args: Any, **values: Any):
        self, *rest = args  # so that a value may be called "self"
        Namespace.__init__(self)
        for name, value in dict(*rest, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}; rename it")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@cache
def sandbox() -> Sandbox:
    """Return the sandbox in which every template is compiled."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_check_output,
        optimized=False,
        extensions=[Generation, loopcontrols],
    )
    filters = environment.filters
    environment.filters = {name: _limited(name, f) for name, f in filters.items()}
    environment.filters["tojson"] = _limited("tojson", _tojson)
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    return environment
