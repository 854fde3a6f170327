"""The JSON of an exported graph, read before torch turns its texts into Python.

Default deny: a text is a plain name unless it is in one of the few places where it may be more, and those are read
here: operations, arithmetic on sizes, descriptions of how inputs nest. Remarks for debuggers are dropped.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError

__all__ = ["check_graph"]

_NAME = re.compile(r"[A-Za-z0-9_.+\-]{0,300}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}|")
_SYMBOL = re.compile(r"[su][0-9]{1,6}")
_OPERATION = re.compile(
    r"torch\.ops\.aten\.[A-Za-z0-9_]+\.[A-Za-z0-9_]+"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_(int|float|max|min|not|sqrt)"
    r"|math\.(ceil|floor|trunc)"
)
# operations on files and on what is not a tensor's values
_FORBIDDEN = re.compile(r"torch\.ops\.aten\.(from_file|save|.*print.*|set_|set_data|.*_out_of_place_file)\b.*")
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv"}
    | {"CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "CeilToInt", "FloorToInt"}
    | {"TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "Identity", "ModularIndexing", "Where"}
    | {"Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan"}
    | {"StrictGreaterThan", "GreaterThan", "And", "Or", "Not"}
)
_KEYWORDS = frozenset({"positive", "integer", "nonnegative", "real", "finite", "precision", "evaluate"})
_ARITHMETIC = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.cmpop),
)
_TREE_TYPES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_MAX_DEPTH = 40
_MAX_POWER = 16


def check_graph(graph: dict[str, Any], path: Path) -> None:
    """Check the content of models/model.json and drop its remarks, in place.

    Raises PackageError for what could be read as more than a graph of known operations, and the errors of `dict` and
    `list` for what is no such graph at all.
    """
    graph["guards_code"] = []
    graph["graph_module"]["metadata"] = {}
    if graph["graph_module"].get("treespec_namedtuple_fields"):
        raise PackageError(f"{path}: its inputs or outputs are named tuples; export a network of plain tensors")
    _walk(graph, "", path, 0)


def _walk(value: Any, place: str, path: Path, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise PackageError(f"{path}: the graph is nested too deeply")
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            value["metadata"] = {}
        for key, inner in value.items():
            if not _NAME.fullmatch(key):
                raise PackageError(f"{path}: the graph has a strange name: {key[:80]!r}")
            _walk(inner, key, path, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, place, path, depth + 1)
    elif isinstance(value, str):
        _check_text(value, place, path)


def _check_text(value: str, place: str, path: Path) -> None:
    if place == "target":
        if not _OPERATION.fullmatch(value) or _FORBIDDEN.fullmatch(value):
            raise PackageError(f"{path}: the graph asks for {value[:120]!r}, which is no operation on tensors")
    elif place == "expr_str":
        if not _is_arithmetic(value):
            raise PackageError(f"{path}: the graph has a size that is no arithmetic: {value[:120]!r}")
    elif place in ("in_spec", "out_spec"):
        _check_tree(json.loads(value), path, 0)
    elif place in ("name", "forward_arg_names", "user_input_name"):
        if not _IDENTIFIER.fullmatch(value):
            raise PackageError(f"{path}: the graph has a strange name: {value[:80]!r}")
    elif not _NAME.fullmatch(value):
        raise PackageError(f"{path}: the graph has a strange text in {place[:40]!r}: {value[:80]!r}")


def _is_arithmetic(text: str) -> bool:
    """Whether an expression is numbers, symbols of sizes and the functions torch writes into exported graphs."""
    if len(text) > 2000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC) or isinstance(node, ast.Pow | ast.LShift):
            return False
        if isinstance(node, ast.Call) and not _is_plain_call(node):
            return False
        if isinstance(node, ast.Name) and not _is_known(node.id, id(node) in functions):
            return False
        if isinstance(node, ast.keyword) and node.arg not in _KEYWORDS:
            return False
        if isinstance(node, ast.Constant) and not _is_number_or_symbol(node.value):
            return False
    return True


def _is_plain_call(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Name):
        return False
    if call.func.id not in ("Pow", "PowByNatural", "FloatPow"):
        return True
    # a tower of powers would take for ever
    numbers = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return all(isinstance(n, str) or (isinstance(n, int | float) and abs(n) <= _MAX_POWER) for n in numbers)


def _is_known(name: str, called: bool) -> bool:
    if called:
        return name in _FUNCTIONS
    return bool(_SYMBOL.fullmatch(name)) or name in ("oo", "int_oo")


def _is_number_or_symbol(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_SYMBOL.fullmatch(value))
    return isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)


def _check_tree(value: Any, path: Path, depth: int) -> None:
    """How inputs nest: tuples, lists and mappings of tensors, as torch.utils._pytree writes it."""
    if depth > _MAX_DEPTH:
        raise PackageError(f"{path}: the inputs are nested too deeply")
    if isinstance(value, list):
        for inner in value:
            _check_tree(inner, path, depth + 1)
    elif isinstance(value, dict):
        context = value.get("context")
        plain = context is None or (isinstance(context, str) and _plain_json(context))
        if value.get("type") not in _TREE_TYPES or not plain:
            raise PackageError(f"{path}: its inputs or outputs are no plain tensors in tuples, lists or mappings")
        _check_tree(value.get("children_spec", []), path, depth + 1)
    elif not isinstance(value, int):
        raise PackageError(f"{path}: the nesting of its inputs is not readable")


def _plain_json(text: str) -> bool:
    keys = json.loads(text)
    return keys is None or (isinstance(keys, list) and all(isinstance(k, str) and _NAME.fullmatch(k) for k in keys))
