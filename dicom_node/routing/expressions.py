"""CEL conditions: compiled by the `cel` package (the Rust implementation), read here for names and positions.

The library says which variables an expression uses, not where; a small lexer of CEL's tokens supplies that, so that
a mistake is reported on the line of the file it stands on, and so that a verdict can name what it looked at.

Bounds: an expression has at most `MAX_LENGTH` characters and `MAX_MACRO_DEPTH` nested list macros; the parser itself
refuses nesting beyond 96; `matches` is a finite automaton (Rust's `regex`, linear in the text like RE2) whose literal
patterns are compiled when the rules are read. CEL has no loops and no recursion, so nothing else can run away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dicom_node.routing import vocabulary
from dicom_node.routing.cel_library import cel

__all__ = ["Expression", "Fault", "Part", "Reference", "parse_expression"]

MAX_LENGTH = 2000
MAX_MACRO_DEPTH = 2

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
    |(?P<string>[bB]?[rR](?:\"{3}.*?\"{3}|'{3}.*?'{3}|\"[^\"\n]*\"|'[^'\n]*')
        |[bB]?(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'))
    |(?P<number>0[xX][0-9a-fA-F]+[uU]?|(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]?)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<operator>&&|\|\||==|!=|<=|>=|.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_CONSTANTS = frozenset({"true", "false", "null"})
_LITERAL = _CONSTANTS | {"[", "]", ",", "-"}
_ERROR_LINE = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with an expression, at which character, and what to write instead."""

    message: str
    remedy: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A variable an expression uses. `name` is 'Modality', 'values.Modality', 'series.frame_count', 'view', 'now'.

    `path` is the literal rest: `ViewCodeSequence[0].CodeValue` has the path (0, 'CodeValue').
    """

    name: str
    path: tuple[str | int, ...]
    offset: int

    @property
    def keyword(self) -> str:
        """The name `missing:` knows it by: that of the attribute, also for `values.<Keyword>`."""
        return self.name.removeprefix("values.")

    @property
    def text(self) -> str:
        """The reference as one writes it."""
        return self.name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`reference operator literal`: the form most conditions have, explained in a sentence of its own."""

    reference: Reference
    operator: str
    literal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a condition between top-level `&&` or `||`, evaluated on its own for the explanation."""

    text: str
    program: cel.Program = field(repr=False, compare=False)
    references: tuple[Reference, ...]
    comparison: Comparison | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A checked, compiled condition. `joiner` is '&&', '||' or '' and says how `parts` make the whole."""

    text: str
    program: cel.Program = field(repr=False, compare=False)
    references: tuple[Reference, ...]
    parts: tuple[Part, ...]
    joiner: str
    macro_depth: int


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    offset: int


def parse_expression(text: str) -> Expression | list[Fault]:
    """Compile a condition, or say everything that is wrong with it."""
    if not text.strip():
        return [Fault(message="the condition is empty", remedy="Write a CEL expression or remove the line", offset=0)]
    if len(text) > MAX_LENGTH:
        message = f"the condition has {len(text)} characters, more than {MAX_LENGTH}"
        return [Fault(message=message, remedy="Split it into several conditions", offset=0)]
    try:
        program = cel.compile(text)
    except ValueError as exc:
        return [_syntax_fault(text, str(exc))]
    tokens = list(_tokens(text))
    faults = [*_name_faults(tokens), *_function_faults(tokens), *_pattern_faults(tokens)]
    depth = _macro_depth(tokens)
    if depth > MAX_MACRO_DEPTH:
        message = f"{depth} list macros are nested, more than {MAX_MACRO_DEPTH}"
        faults.append(Fault(message=message, remedy="Split the condition", offset=0))
    if faults:
        return sorted(faults, key=lambda fault: fault.offset)
    joiner, pieces = _split(tokens)
    return Expression(
        text=text.strip(),
        program=program,
        references=_references(tokens),
        parts=tuple(_part(text, piece) for piece in pieces),
        joiner=joiner,
        macro_depth=depth,
    )


def _syntax_fault(text: str, said: str) -> Fault:
    """The library's first complaint as a fault; its list of everything it would have accepted is left out."""
    found = _ERROR_LINE.search(said)
    if found is None:
        return Fault(message="not a CEL expression", remedy="See cel.dev for the language", offset=0)
    line, column = int(found[1]), int(found[2])
    lines = text.splitlines(keepends=True)
    offset = min(sum(map(len, lines[: line - 1])) + column - 1, len(text))
    what = found[3].split(" expecting ")[0].removeprefix("Syntax error: ")
    if "has()" in what:
        remedy = "has() takes a member: write has(values.<Keyword>)"
    elif "token recognition error at: '= " in what or re.search(r"[^=!<>]=[^=]", text):
        remedy = "Compare with ==, not ="
    elif text.count('"') % 2 or text.count("'") % 2:
        remedy = "Close the text; quote the whole condition if it holds ' #' (YAML takes that for a comment)"
    else:
        remedy = "Correct the CEL expression"
    what = what.replace("'<EOF>'", "the end of the condition")
    return Fault(message=f"not a CEL expression: {what}", remedy=remedy, offset=offset)


# --- tokens and names ----------------------------------------------------------------------------------------------


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup and match.lastgroup != "space":
            yield _Token(match.lastgroup, match[0], match.start())


def _after(tokens: Sequence[_Token], index: int) -> str:
    return tokens[index + 1].text if index + 1 < len(tokens) else ""


def _is_member(tokens: Sequence[_Token], index: int) -> bool:
    return index > 0 and tokens[index - 1].text == "."


def _is_call(tokens: Sequence[_Token], index: int) -> bool:
    return tokens[index].kind == "name" and _after(tokens, index) == "("


def _bound(tokens: Sequence[_Token]) -> dict[str, int]:
    """Variables that list macros introduce (`v` in `exists(v, ...)`), with where."""
    return {
        tokens[i + 2].text: tokens[i + 2].offset
        for i, token in enumerate(tokens[:-2])
        if token.text in vocabulary.MACROS and _is_call(tokens, i) and tokens[i + 2].kind == "name"
    }


def _roots(tokens: Sequence[_Token]) -> Iterator[int]:
    """Indices of names that are variables: no constants, calls, members or macro variables."""
    bound = _bound(tokens)
    for i, token in enumerate(tokens):
        if token.kind != "name" or token.text in bound or token.text in _CONSTANTS or token.text == "in":
            continue
        if not _is_member(tokens, i) and not _is_call(tokens, i):
            yield i


def _tail(tokens: Sequence[_Token], index: int) -> tuple[str | int, ...]:
    """The literal members and subscripts that follow the name at `index`."""
    path: list[str | int] = []
    i = index + 1
    while i + 1 < len(tokens):
        if tokens[i].text == "." and tokens[i + 1].kind == "name" and not _is_call(tokens, i + 1):
            path.append(tokens[i + 1].text)
            i += 2
        elif tokens[i].text == "[" and tokens[i + 1].kind == "number" and _after(tokens, i + 1) == "]":
            if not tokens[i + 1].text.isdigit():
                break
            path.append(int(tokens[i + 1].text))
            i += 3
        else:
            break
    return tuple(path)


def _references(tokens: Sequence[_Token]) -> tuple[Reference, ...]:
    found = []
    for i in _roots(tokens):
        name, path = tokens[i].text, _tail(tokens, i)
        if name == "values" or name in vocabulary.NAMESPACES:
            name, path = f"{name}.{path[0]}", path[1:]
        found.append(Reference(name=name, path=path, offset=tokens[i].offset))
    return tuple(found)


def _part(text: str, tokens: Sequence[_Token]) -> Part:
    source = text[tokens[0].offset : tokens[-1].offset + len(tokens[-1].text)]
    return Part(
        text=source,
        program=cel.compile(source),
        references=_references(tokens),
        comparison=_comparison(text, tokens),
    )


def _comparison(text: str, tokens: Sequence[_Token]) -> Comparison | None:
    """The part as a comparison of one variable with a constant, if that is what it is."""
    references = _references(tokens)
    at = next((i for i, t in enumerate(tokens) if t.text in ("==", "!=", "<", "<=", ">", ">=", "in")), 0)
    if len(references) != 1 or not at or tokens[0].kind != "name" or any(_is_call(tokens, i) for i in range(at)):
        return None
    right = tokens[at + 1 :]
    if not all(t.kind in ("string", "number") or t.text in _LITERAL for t in right):
        return None
    if text[tokens[0].offset : tokens[at].offset].strip() != references[0].text:
        return None
    literal = text[right[0].offset : right[-1].offset + len(right[-1].text)]
    return Comparison(reference=references[0], operator=tokens[at].text, literal=literal)


def _split(tokens: Sequence[_Token]) -> tuple[str, list[Sequence[_Token]]]:
    """The top-level operands of `||`, else of `&&`, else the whole."""
    depth = 0
    at: dict[str, list[int]] = {"||": [], "&&": [], "?": []}
    for i, token in enumerate(tokens):
        depth += (token.text in _OPEN) - (token.text in _CLOSE)
        if depth == 0 and token.kind == "operator" and token.text in at:
            at[token.text].append(i)
    joiner = "" if at["?"] else "||" if at["||"] else "&&" if at["&&"] else ""
    if not joiner:
        return "", [tokens]
    edges = [-1, *at[joiner], len(tokens)]
    return joiner, [tokens[a + 1 : b] for a, b in pairwise(edges)]


def _macro_depth(tokens: Sequence[_Token]) -> int:
    deepest, open_macros, stack = 0, 0, []
    for i, token in enumerate(tokens):
        if token.text == "(":
            is_macro = i > 0 and tokens[i - 1].text in vocabulary.MACROS
            stack.append(is_macro)
            open_macros += is_macro
            deepest = max(deepest, open_macros)
        elif token.text == ")" and stack:
            open_macros -= stack.pop()
    return deepest


# --- checks --------------------------------------------------------------------------------------------------------


def _name_faults(tokens: Sequence[_Token]) -> Iterator[Fault]:
    for name, offset in _bound(tokens).items():
        if vocabulary.is_keyword(name) or name in _VARIABLES:
            yield Fault(
                message=f"the macro variable {name!r} hides the variable of that name",
                remedy="Name it by one small letter, such as v",
                offset=offset,
            )
    members = set()
    for i in _roots(tokens):
        name = tokens[i].text
        if name == "values" or name in vocabulary.NAMESPACES:
            yield from _member_faults(tokens, i)
            members.add(i + 2)
        elif name not in _VARIABLES:
            yield from _keyword_faults(tokens[i], "a variable")
    for i, token in enumerate(tokens):
        if token.kind == "name" and _is_member(tokens, i) and not _is_call(tokens, i) and i not in members:
            yield from _keyword_faults(token, "an attribute")


_VARIABLES = frozenset({*vocabulary.DERIVED, *vocabulary.NAMESPACES, "values", "now"})


def _keyword_faults(token: _Token, what: str) -> Iterator[Fault]:
    name = token.text
    if not vocabulary.is_keyword(name):
        known = [*vocabulary.all_keywords(), *(_VARIABLES if what == "a variable" else ())]
        remedy = vocabulary.suggestion(name, known) or "Use a keyword of DICOM PS3.6, such as Modality"
        yield Fault(message=f"{name!r} is no DICOM keyword", remedy=_sentence(remedy), offset=token.offset)
    elif vocabulary.is_bulk(name):
        yield Fault(
            message=f"{name} is bulk data, which rules do not see",
            remedy="Use an attribute of the header",
            offset=token.offset,
        )


def _member_faults(tokens: Sequence[_Token], index: int) -> Iterator[Fault]:
    """Of `series`, `study`, `source` and `values`, which must be followed by a known member."""
    space = tokens[index].text
    tail = _tail(tokens, index)
    known = vocabulary.NAMESPACES.get(space)
    if not tail or not isinstance(tail[0], str):
        example = f"{space}.{known[0]}" if known else "values.ViewPosition"
        message = f"{space!r} is a name space, not a value"
        yield Fault(message=message, remedy=f"Name a member, such as {example}", offset=tokens[index].offset)
    elif known is not None and tail[0] not in known:
        remedy = vocabulary.suggestion(tail[0], known) or f"Known are {', '.join(known)}"
        yield Fault(message=f"{space} has no {tail[0]!r}", remedy=_sentence(remedy), offset=tokens[index + 2].offset)
    elif known is None and tail[0] not in vocabulary.DERIVED:
        yield from _keyword_faults(tokens[index + 2], "an attribute")


def _function_faults(tokens: Sequence[_Token]) -> Iterator[Fault]:
    for i, token in enumerate(tokens):
        if _is_call(tokens, i) and token.text not in vocabulary.FUNCTIONS and token.text != "in":
            remedy = vocabulary.suggestion(token.text, vocabulary.FUNCTIONS) or (
                f"Known are {', '.join(vocabulary.FUNCTIONS)}"
            )
            message = f"there is no function {token.text!r}"
            yield Fault(message=message, remedy=_sentence(remedy), offset=token.offset)


def _pattern_faults(tokens: Sequence[_Token]) -> Iterator[Fault]:
    """Literal regular expressions are tried once, so that a bad one is found when the rules are read."""
    for i, token in enumerate(tokens[:-3]):
        pattern = tokens[i + 2]
        if token.text == "matches" and _is_call(tokens, i) and pattern.kind == "string":
            try:
                cel.evaluate(f'"".matches({pattern.text})')
            except RuntimeError as exc:
                why = str(exc).splitlines()[-1].removeprefix("error: ").split(". Check function")[0]
                message = f"the pattern {pattern.text} is no regular expression: {why}"
                yield Fault(message=message, remedy="Use RE2 syntax", offset=pattern.offset)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
