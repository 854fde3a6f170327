"""A bundle's configuration as data: references and the plain arithmetic in `$` expressions, worked out by a walker.

`@id`, `@a#b`, `a::b` are followed; expressions may hold constants, references, lists, + - * / //, comparisons,
and/or/not, `x if c else y`, an index, and len, list, tuple, int, float of one of them. The whole expression is checked
before any of it is worked out, so that a branch not taken may hold no Python either. Nothing is imported, called or
evaluated by Python itself.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dicom_node.errors import PackageError
from dicom_node.models.package import read_regular
from dicom_node.models.plain import check_plain, read_yaml

__all__ = ["MAX_CONFIG_BYTES", "Config", "mapping_of", "read_mapping"]

MAX_CONFIG_BYTES = 1024**2
_MAX_DEPTH = 32
_MAX_STEPS = 20_000  # values looked at, all together: references to references grow exponentially
_MAX_LENGTH = 1024
_MAX_NUMBER = 2**53


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a json or yaml file. Raises PackageError: absurd size, tags, no mapping at the top."""
    return mapping_of(path, read_regular(path, MAX_CONFIG_BYTES))


def _first_line(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "nested without end"
    return (str(exc).splitlines() or [""])[0][:200] or type(exc).__name__


def mapping_of(path: Path, content: bytes) -> dict[str, Any]:
    """The keys and values in `content`, json or yaml by the suffix of `path`, which is what errors name."""
    try:
        text = content.decode("utf-8")
        found = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise PackageError(f"{path}: not readable as plain {path.suffix[1:]}: {_first_line(exc)}") from exc
    try:
        check_plain(found)
    except ValueError as exc:
        raise PackageError(f"{path}: {exc}") from exc
    if not isinstance(found, dict):
        raise PackageError(f"{path}: expected keys and values at the top")
    return found


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_EQUAL: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.eq,  # of constants: `@x is None`, `@x is True`
    ast.IsNot: operator.ne,
}
_ORDER: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_PLAIN_NODES = (
    *(ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.BoolOp),
    *(ast.And, ast.Or, ast.Compare, ast.IfExp, ast.Subscript, *_ARITHMETIC, *_EQUAL, *_ORDER),
)
# of one plain value; what they are called in an expression leads here, not to Python's own
_FUNCTIONS: Mapping[str, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
    "len": ((list, str), len),
    "list": ((list,), list),
    "tuple": ((list,), list),
    "int": ((int, float), int),
    "float": ((int, float), float),
}
_REFERENCE = re.compile(r"@([A-Za-z0-9_#:]+)")
_SUM_OF_LISTS = re.compile(r"\$?\s*@[A-Za-z0-9_#:]+(\s*\+\s*@[A-Za-z0-9_#:]+)*\s*")
_EXECUTED = "holds Python that would have to be executed; packages are read as data (trust: data)"


class Config:
    """A configuration whose references and expressions are resolved when asked for. `path` is what errors name."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._content = content
        self._steps = 0

    def refuse(self, key: str, why: str) -> PackageError:
        """The error for `key`."""
        return PackageError(f"{self.path}: {key}: {why}")

    def has(self, key: str) -> bool:
        """Whether the top level has `key`."""
        return key in self._content

    def raw(self, key: str) -> Any:
        """What stands at `key` (`a#0#b`), unresolved. Raises PackageError when nothing does."""
        value: Any = self._content
        for part in key.replace("::", "#").split("#"):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (LookupError, TypeError, ValueError):
                raise self.refuse(key, "is not in the configuration") from None
        return value

    def items(self, key: str, raw: Any, depth: int = 0) -> list[tuple[str, Any]]:
        """(key, unresolved item) of the list at `key`; `@a` and `$@a + @b` are followed and joined."""
        self._count(key, depth)
        if isinstance(raw, list):
            return [(f"{key}#{number}", item) for number, item in enumerate(raw)]
        if not isinstance(raw, str) or not _SUM_OF_LISTS.fullmatch(raw):
            raise self.refuse(key, "expected a list of transforms, or references to such lists")
        return [item for name in _REFERENCE.findall(raw) for item in self.items(name, self.raw(name), depth + 1)]

    def value(self, key: str, raw: Any, depth: int = 0) -> Any:
        """`raw`, which stands at `key`, with every reference and expression in it worked out."""
        self._count(key, depth)
        if isinstance(raw, Mapping):
            return {name: self.value(f"{key}#{name}", inner, depth + 1) for name, inner in raw.items()}
        if isinstance(raw, list):
            return [self.value(f"{key}#{n}", inner, depth + 1) for n, inner in enumerate(raw)]
        if isinstance(raw, str):
            if raw.startswith("@"):
                return self.value(raw[1:], self.raw(raw[1:]), depth + 1)
            if raw.startswith("%"):
                raise self.refuse(key, f"macro {raw[:60]!r} includes another file; put its content here")
            if raw.startswith("$"):
                names, tree = self._parsed(key, raw[1:])
                return self._walk(key, tree, names, depth + 1)
        return raw

    def threshold(self, key: str, raw: Any) -> float:
        """The number n of a function `$lambda x: x > n`, which is read and never called. Raises PackageError."""
        names, tree = self._parsed(key, raw[1:], function=True) if str(raw).startswith("$") else ({}, None)
        match tree:
            case ast.Lambda(
                args=ast.arguments(
                    posonlyargs=[], args=[ast.arg(arg=given)], vararg=None, kwonlyargs=[], kwarg=None, defaults=[]
                ),
                body=ast.Compare(left=ast.Name(id=used), ops=[ast.Gt()], comparators=[limit]),
            ) if used == given:
                found = self._walk(key, limit, names, 0)
                if _is_number(found):
                    return float(found)
        raise self.refuse(key, "only '$lambda x: x > number' is understood here; it is not called")

    def _count(self, key: str, depth: int) -> None:
        self._steps += 1
        if depth > _MAX_DEPTH:
            raise self.refuse(key, "references go round in circles or too deep")
        if self._steps > _MAX_STEPS:
            raise self.refuse(key, f"more than {_MAX_STEPS} values have to be worked out")

    def _parsed(self, key: str, text: str, *, function: bool = False) -> tuple[dict[str, str], ast.expr]:
        """The expression, in which `names` stand for references. Raises PackageError for anything but plain nodes."""
        names: dict[str, str] = {}  # references are no Python: "@a#b" becomes a name that is looked up again

        def named(found: re.Match[str]) -> str:
            name = f"reference_{len(names)}"
            names[name] = found[1]
            return name

        try:
            if len(text) > 4 * _MAX_LENGTH:
                raise ValueError("too long")
            tree = ast.parse(_REFERENCE.sub(named, text).strip(), mode="eval").body
            nodes = list(ast.walk(tree))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise self.refuse(key, f"expression {text[:60]!r} is not understood") from None
        own = set(names)
        if function and isinstance(tree, ast.Lambda):
            nodes = list(ast.walk(tree.body))
            own |= {argument.arg for argument in tree.args.args}
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _is_plain_call(node)}
        for node in nodes:
            if id(node) in called or (isinstance(node, ast.Call) and id(node.func) in called):
                continue
            if not isinstance(node, _PLAIN_NODES) or (isinstance(node, ast.Name) and node.id not in own):
                raise self.refuse(key, _EXECUTED)
        return names, tree

    def _walk(self, key: str, node: ast.expr, names: Mapping[str, str], depth: int) -> Any:
        self._count(key, depth)

        def inner(part: ast.expr) -> Any:
            return self._walk(key, part, names, depth + 1)

        match node:
            case ast.Constant(value=constant) if isinstance(constant, int | float | str | type(None)):
                return constant
            case ast.Name(id=name) if name in names:
                return self.value(names[name], self.raw(names[name]), depth + 1)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [inner(item) for item in items]
            case ast.UnaryOp(op=ast.USub(), operand=operand) if _is_number(found := inner(operand)):
                return -found
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not inner(operand)
            case ast.IfExp(test=test, body=body, orelse=other):
                return inner(body) if inner(test) else inner(other)
            case ast.BoolOp(op=op, values=values):
                found = inner(values[0])
                for value in values[1:]:
                    if bool(found) is isinstance(op, ast.Or):
                        break
                    found = inner(value)
                return found
            case ast.Compare(left=left, ops=ops, comparators=others):
                values = [inner(part) for part in (left, *others)]
                return all(self._compare(key, op, *values[n : n + 2]) for n, op in enumerate(ops))
            case ast.BinOp(left=left, op=op, right=right):
                return self._calculate(key, op, inner(left), inner(right))
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in _FUNCTIONS:
                taken, function = _FUNCTIONS[name]
                found = inner(argument)
                if isinstance(found, taken) and found == found and abs(_size(found)) <= _MAX_NUMBER:
                    return function(found)
            case ast.Subscript(value=listed, slice=index):
                found, at = inner(listed), inner(index)
                if isinstance(found, list) and type(at) is int and -len(found) <= at < len(found):
                    return found[at]
        raise self.refuse(key, _EXECUTED)

    def _compare(self, key: str, op: ast.cmpop, left: Any, right: Any) -> bool:
        if type(op) in _EQUAL:
            return _EQUAL[type(op)](left, right)
        if (_is_number(left) and _is_number(right)) or (isinstance(left, str) and isinstance(right, str)):
            return _ORDER[type(op)](left, right)
        raise self.refuse(key, "an expression compares what has no order")

    def _calculate(self, key: str, op: ast.operator, left: Any, right: Any) -> Any:
        if _is_number(left) and _is_number(right):
            try:
                found = _ARITHMETIC[type(op)](left, right)
            except ArithmeticError:
                raise self.refuse(key, "an expression divides by zero") from None
            if abs(found) <= _MAX_NUMBER:
                return found
        same = (isinstance(left, str) and isinstance(right, str)) or (
            isinstance(left, list) and isinstance(right, list)
        )
        if isinstance(op, ast.Add) and same and len(left) + len(right) <= _MAX_LENGTH:
            return left + right
        raise self.refuse(key, _EXECUTED)


def _is_plain_call(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and len(node.args) == 1 and not node.keywords


def _size(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
