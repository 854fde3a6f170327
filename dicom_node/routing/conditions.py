"""One condition on one series: true, false, missing, mixed or error, with the values it saw and what would change it.

CEL's own logic decides whether a missing name matters: a name that is absent, or that differs within the series, is
simply not declared, and `||` and `&&` absorb it when the rest decides (`true || unknown` is true). Only when the
result depends on it does the condition end as MISSING or MIXED. So nothing is guessed and nothing ends in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from dicom_node.model import Condition, ConditionResult
from dicom_node.routing import vocabulary
from dicom_node.routing.cel_library import cel
from dicom_node.routing.expressions import Comparison, Expression, Part, Reference
from dicom_node.routing.variables import Absent, Differing, Known, Lookup, Unusable, Variables

__all__ = ["Outcome", "evaluate_condition"]

_FEW = 8  # values shown in an explanation; the rest is counted
_NESTED_ITEMS = 128  # elements a list may have when macros are nested: 128 x 128 steps
_TEXT = 160  # characters of one value kept in a verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`held` is true when the condition is TRUE, or MISSING where the rule allows every absent name to be missing."""

    result: ConditionResult
    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The variables of one condition: what CEL is given, and what was withheld from it."""

    context: Mapping[str, Any]
    values: Mapping[str, Any]  # what a verdict keeps
    allowed: frozenset[str]
    absent: Mapping[str, str]  # attribute name to why; allowed ones too
    unusable: tuple[str, ...]
    differing: Mapping[str, str]
    partly: Mapping[str, int]  # allowed, absent in so many instances


def evaluate_condition(expression: Expression, variables: Variables, allowed: frozenset[str]) -> Outcome:
    """How `expression` ends for the series. `allowed` are the names whose absence the rule lets pass.

    Never raises for what a file holds: what CEL cannot evaluate is an ERROR with its reason.
    """
    seen = _look(expression, variables, allowed)
    outcome, why = _run(expression.program, seen)
    if outcome in (Condition.MISSING, Condition.MIXED) and expression.joiner:
        outcome, why = _worst(expression, seen) or (outcome, why)
    lacks_allowed_only = bool(seen.absent) and allowed >= seen.absent.keys()
    held = outcome is Condition.TRUE or (outcome is Condition.MISSING and lacks_allowed_only)
    result = ConditionResult(
        expression=expression.text,
        outcome=outcome,
        values=seen.values,
        explanation=_explain(expression, seen, outcome, why, held),
    )
    return Outcome(result=result, held=held)


# --- looking -------------------------------------------------------------------------------------------------------


def _look(expression: Expression, variables: Variables, allowed: frozenset[str]) -> _Seen:
    context: dict[str, Any] = {"values": {}, **{space: {} for space in vocabulary.NAMESPACES}}
    values: dict[str, Any] = {}
    absent: dict[str, str] = {}
    differing: dict[str, str] = {}
    partly: dict[str, int] = {}
    unusable: list[str] = []
    for reference in expression.references:
        found = _nested_bound(variables.lookup(reference.name), expression)
        values[reference.name] = _shown(found)
        match found:
            case Known(absent_in=0):
                _declare(context, reference.name, found.value)
                if missing := _missing_path(reference, found.value):
                    absent.setdefault(reference.keyword, missing)
            case Known() if reference.keyword in allowed:
                _declare(context, reference.name, found.value)
                partly[reference.keyword] = found.absent_in
            case Known():
                absent[reference.keyword] = f"{reference.keyword} is absent in {found.absent_in} of the instances"
            case Absent():
                absent[reference.keyword] = found.why
            case Differing():
                differing[reference.name] = found.why
            case Unusable():
                unusable.append(found.why)
    return _Seen(
        context=context,
        values=values,
        allowed=allowed,
        absent=absent,
        unusable=tuple(unusable),
        differing=differing,
        partly=partly,
    )


def _declare(context: dict[str, Any], name: str, value: Any) -> None:
    space, _, member = name.rpartition(".")
    (context[space] if space else context)[member] = value


def _nested_bound(found: Lookup, expression: Expression) -> Lookup:
    items = found.value if isinstance(found, Known) and isinstance(found.value, list) else []
    if expression.macro_depth > 1 and len(items) > _NESTED_ITEMS:
        return Unusable(why=f"a list has more than {_NESTED_ITEMS} elements, too many for nested macros")
    return found


def _missing_path(reference: Reference, value: Any) -> str:
    """Why the literal path of the reference leads nowhere, '' if it does lead somewhere."""
    for step in reference.path:
        if isinstance(step, int) and isinstance(value, list):
            if step >= len(value):
                return f"{reference.text} is absent: {reference.name} has {len(value)} value(s)"
            value = value[step]
        elif isinstance(step, str) and isinstance(value, dict):
            if step not in value:
                return f"{reference.text} is absent: the item has no {step}"
            value = value[step]
        else:
            return ""  # a step of the wrong kind is an error of type, which CEL reports
    return ""


def _shown(found: Lookup) -> Any:
    """What a verdict keeps of a variable: JSON-ready and small; None for absent, the list for differing values."""
    match found:
        case Known():
            return _small(found.value)
        case Differing():
            return _small(list(found.values))
        case _:
            return None


def _small(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, str):
        return value if len(value) <= _TEXT else value[:_TEXT] + "..."
    if isinstance(value, list):
        few = [_small(item) for item in value[:_FEW]]
        return few if len(value) <= _FEW else [*few, f"... {len(value) - _FEW} more"]
    if isinstance(value, dict):
        return {key: _small(value[key]) for key in sorted(value, key=str)}  # a map of CEL has no order of its own
    return value


# --- running -------------------------------------------------------------------------------------------------------


def _run(program: cel.Program, seen: _Seen) -> tuple[Condition, str]:
    """The outcome and, unless it is TRUE or FALSE, CEL's own reason."""
    try:
        value = program.execute(dict(seen.context))
    except (TypeError, ArithmeticError, ValueError) as exc:
        return Condition.ERROR, _said(exc)
    except (RuntimeError, LookupError) as exc:
        # an undeclared name is a RuntimeError, a member or subscript that is not there a LookupError
        return _withheld(seen, exc), _said(exc)
    if isinstance(value, bool):
        return (Condition.TRUE if value else Condition.FALSE), ""
    return Condition.ERROR, f"a condition must be true or false, this one gives {_small(value)!r}"


def _withheld(seen: _Seen, exc: Exception) -> Condition:
    if seen.unusable:
        return Condition.ERROR
    if seen.differing:
        return Condition.MIXED
    if seen.absent or isinstance(exc, LookupError):
        return Condition.MISSING
    return Condition.ERROR


def _worst(expression: Expression, seen: _Seen) -> tuple[Condition, str] | None:
    """An ERROR among the operands of a condition that also lacks something; CEL reports only one of the two."""
    outcomes = (_run(part.program, _of_part(part, seen)) for part in expression.parts)
    return next(((outcome, why) for outcome, why in outcomes if outcome is Condition.ERROR), None)


def _of_part(part: Part, seen: _Seen) -> _Seen:
    names = {reference.name for reference in part.references}
    keywords = {reference.keyword for reference in part.references}
    return replace(
        seen,
        values={name: value for name, value in seen.values.items() if name in names},
        absent={name: why for name, why in seen.absent.items() if name in keywords},
        differing={name: why for name, why in seen.differing.items() if name in names},
        partly={name: count for name, count in seen.partly.items() if name in keywords},
    )


def _said(exc: Exception) -> str:
    if isinstance(exc, TypeError):
        return "the values are not of the kinds this operation compares"
    text = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    text = text.split(". Check ")[0].strip("'\". ")
    return f"an item has no {text}" if isinstance(exc, KeyError) else text


# --- explaining ----------------------------------------------------------------------------------------------------


def _explain(expression: Expression, seen: _Seen, outcome: Condition, why: str, held: bool) -> str:
    match outcome:
        case Condition.TRUE:
            partly = "".join(f"; {name} is absent in {n} of the instances, allowed" for name, n in seen.partly.items())
            return f"{_values(seen)}{partly}" if seen.values else "it is always true"
        case Condition.FALSE:
            return _explain_false(expression, seen)
        case Condition.MISSING:
            return _explain_missing(seen, why, held)
        case Condition.MIXED:
            return _explain_mixed(seen)
        case _:
            return _explain_error(expression, seen, why)


def _explain_false(expression: Expression, seen: _Seen) -> str:
    """What is false about it: for `&&` the operands that are false, for `||` all of them."""
    sentences = []
    for part in expression.parts:
        mine = _of_part(part, seen)
        outcome, _ = _run(part.program, mine)
        if outcome is Condition.FALSE:
            sentences.append(_part_false(part, mine, alone=len(expression.parts) == 1))
    if not sentences:
        return f"it is false with {_values(seen)}" if seen.values else "it is always false"
    return ("; or " if expression.joiner == "||" else "; ").join(sentences)


def _part_false(part: Part, seen: _Seen, *, alone: bool) -> str:
    if part.comparison is not None:
        return _comparison_false(part.comparison, seen)
    if not seen.values:
        return "it is always false" if alone else f"{part.text} is always false"
    return f"it is false with {_values(seen)}" if alone else f"{part.text} is false with {_values(seen)}"


def _comparison_false(comparison: Comparison, seen: _Seen) -> str:
    reference, literal = comparison.reference, comparison.literal
    value = _small(_follow(seen.context, reference))
    wanted = {
        "==": f"it would have to be {literal}",
        "!=": "any other value would do",
        "in": f"it would have to be one of {literal.strip('[]')}",
        "<": f"it would have to be below {literal}",
        "<=": f"it would have to be at most {literal}",
        ">": f"it would have to be above {literal}",
        ">=": f"it would have to be at least {literal}",
    }[comparison.operator]
    return f"{reference.text} is {value!r}; {wanted}"


def _follow(context: Mapping[str, Any], reference: Reference) -> Any:
    space, _, member = reference.name.rpartition(".")
    value: Any = (context[space] if space else context)[member]
    for step in reference.path:
        value = value[step]
    return value


def _explain_missing(seen: _Seen, why: str, held: bool) -> str:
    whys = "; ".join(seen.absent.values()) or why
    if held:
        return f"{whys}; the rule allows that"
    names = sorted(seen.absent.keys() - seen.allowed)
    if not names:
        return f"{whys}; test for it with has() or write a condition that does not need it"
    policy = ", ".join(f"{name}: allow" for name in names)
    return f"{whys}; it would have to be there, or the rule to say `missing: {{{policy}}}`"


def _explain_mixed(seen: _Seen) -> str:
    name = next(iter(seen.differing))
    shown = ", ".join(repr(value) for value in seen.values[name])
    also = "".join(f"; {why}" for why in [*list(seen.differing.values())[1:], *seen.absent.values()])
    return (
        f"{seen.differing[name]}: {shown}{also}; all would have to agree, "
        f"or the condition to ask for the list: values.{name}.exists(v, ...)"
    )


def _explain_error(expression: Expression, seen: _Seen, why: str) -> str:
    kinds = "; ".join(
        f"{reference.keyword} is {vocabulary.kind(reference.keyword)}"
        for reference in {r.name: r for r in expression.references}.values()
        if vocabulary.is_keyword(reference.name)
    )
    whys = "; ".join([*seen.unusable, *([why] if why and not seen.unusable else []), *seen.absent.values()])
    shown = f" (it saw {_values(seen)})" if seen.values else ""
    return f"{whys}{shown}" + (f"; {kinds}" if kinds else "") + "; the condition or the value has to be corrected"


def _values(seen: _Seen) -> str:
    return ", ".join(
        f"{name} absent" if value is None else f"{name} = {value!r}" for name, value in seen.values.items()
    )
