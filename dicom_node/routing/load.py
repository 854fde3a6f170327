"""Rule files: YAML for structure, CEL for conditions, every mistake with file, line and remedy.

A file holds one rule, or several separated by `---`; a file of comments only holds none. Files are read in the order
of their names. The YAML is read as nodes, not as values, because nodes know their lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

import yaml

from dicom_node.errors import ConfigError, RuleError
from dicom_node.model import LatePolicy, Priority, SendWhat
from dicom_node.plugins import encoder_kinds
from dicom_node.routing import vocabulary
from dicom_node.routing.expressions import Expression, parse_expression
from dicom_node.routing.rules import SENDER, Rule, RuleSet

__all__ = ["check_rules", "load_rules"]

MAX_FILE_BYTES = 256 * 1024
MAX_BRACKETS = 50
MAX_RULES = 500
MAX_CONDITIONS = 64

_KEYS = (
    *("rule", "description", "when", "missing", "run", "send", "late_instances"),
    *("stop", "fallback", "origin"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_YAML_TYPE = "tag:yaml.org,2002:"
_TRUE, _FALSE = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})
_E = TypeVar("_E", bound=Enum)


def load_rules(
    folder: Path, *, engines: Collection[str], destinations: Collection[str], results: Collection[str] | None = None
) -> RuleSet:
    """The rules of `folder/*.yaml`. An empty folder gives a rule set without rules.

    `engines` and `destinations` are the configured names, `results` the kinds of result there are encoders for
    (None: every kind there is).
    Raises RuleError for the first mistake and ConfigError when the folder is missing; nothing is half loaded.
    """
    reader = _read(folder, engines, destinations, results)
    if reader.problems:
        raise reader.problems[0]
    rules = tuple(reader.rules)
    return RuleSet(rules=rules, digest=_digest(rules))


def check_rules(
    folder: Path, *, engines: Collection[str], destinations: Collection[str], results: Collection[str] | None = None
) -> list[RuleError]:
    """Everything that is wrong with the rules of `folder`, in the order of the files. Raises ConfigError as above."""
    return _read(folder, engines, destinations, results).problems


def _read(
    folder: Path, engines: Collection[str], destinations: Collection[str], results: Collection[str] | None
) -> _Reader:
    try:
        if not folder.is_dir():
            raise ConfigError(f"rules folder {folder} does not exist; create it (an empty one is a plain archive)")
        paths = sorted(folder.iterdir())
    except OSError as exc:
        raise ConfigError(f"rules folder {folder} cannot be read: {exc.strerror}; correct its permissions") from exc
    kinds = encoder_kinds() if results is None else results
    reader = _Reader(engines=engines, destinations=destinations, results=kinds)
    for path in paths:
        if path.name.startswith(".") or not path.is_file():
            continue
        reader.file = path
        if path.suffix == ".yml":
            reader.fault(0, "rule files end in .yaml", "Rename the file, or it would be left out in silence")
        elif path.suffix == ".yaml":
            reader.read_file()
    reader.problems.sort(key=lambda problem: (problem.file, problem.line))
    return reader


def _digest(rules: tuple[Rule, ...]) -> str:
    """SHA-256 of what the rules say, without comments, descriptions and places."""
    said = [
        {
            "rule": rule.name,
            "when": [condition.text for condition in rule.conditions],
            "missing": sorted(rule.allowed_missing),
            "run": [rule.engine, rule.priority.value, rule.results],
            "send": [rule.destinations, rule.send_what.value],
            "late_instances": rule.late_instances.value,
            "flags": [rule.stop, rule.fallback, rule.any_origin],
        }
        for rule in rules
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class _Fields:
    """A YAML mapping by key, with the line of each key."""

    values: dict[str, yaml.Node]
    lines: dict[str, int]
    line: int

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)


@dataclass(slots=True)
class _Reader:
    """Reads files one after the other and collects rules and problems; lines count from 0 in here."""

    engines: Collection[str]
    destinations: Collection[str]
    results: Collection[str]
    file: Path = field(default_factory=Path)
    text: str = ""
    rules: list[Rule] = field(default_factory=list)
    problems: list[RuleError] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def fault(self, line: int, message: str, remedy: str) -> None:
        self.problems.append(RuleError(message, file=self.file, line=line + 1, remedy=remedy))

    # --- files and documents

    def read_file(self) -> None:
        try:
            data = self.file.read_bytes()
            self.text = data.decode("utf-8")
        except OSError as exc:
            return self.fault(0, f"the file cannot be read: {exc.strerror}", "Correct its permissions")
        except UnicodeDecodeError as exc:
            return self.fault(data[: exc.start].count(b"\n"), "the file is not UTF-8", "Save it as UTF-8")
        if len(data) > MAX_FILE_BYTES:
            return self.fault(0, f"the file has more than {MAX_FILE_BYTES} bytes", "Split it")
        if (line := _too_deep(self.text)) is not None:
            return self.fault(line, f"more than {MAX_BRACKETS} brackets are open", "Close them")
        try:
            documents = list(yaml.compose_all(self.text, Loader=yaml.SafeLoader))
        except yaml.MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            message = f"not readable as YAML: {exc.problem or exc.context}"
            remedy = "Put a condition that begins with a quote or a '!' in quotes as a whole; indent with blanks"
            return self.fault(mark.line if mark else 0, message, remedy)
        except (yaml.YAMLError, RecursionError) as exc:
            said = str(exc).splitlines()[0]
            return self.fault(0, f"not readable as YAML: {said}", "Remove what is no rule from the file")
        for node in documents:
            if node.tag != f"{_YAML_TYPE}null":
                self._rule(node)
        return None

    def _rule(self, node: yaml.Node) -> None:
        before = len(self.problems)
        fields = self._fields(node, _KEYS, "a rule")
        if fields is None:
            return
        rule = self._checked(fields)
        if rule is None or len(self.problems) > before:
            return
        if len(self.rules) >= MAX_RULES:
            self.fault(fields.line, f"there are more than {MAX_RULES} rules", "Join some")
            return
        self.rules.append(rule)

    def _checked(self, fields: _Fields) -> Rule | None:
        name = self._name(fields)
        fallback = self._flag(fields, "fallback")
        conditions = self._conditions(fields, fallback=fallback)
        engine, priority, results = self._run(fields)
        destinations, send_what = self._send(fields, runs="run" in fields.values)
        if "run" not in fields.values and "send" not in fields.values:
            self.fault(fields.line, "the rule neither runs nor sends anything", "Add `run:` or `send:`")
        return Rule(
            name=name,
            description=self._text(fields, "description"),
            conditions=conditions,
            allowed_missing=self._missing(fields, conditions),
            engine=engine,
            priority=priority,
            results=results,
            destinations=destinations,
            send_what=send_what,
            late_instances=self._choice(fields, "late_instances", LatePolicy, LatePolicy.RERUN),
            stop=self._flag(fields, "stop"),
            fallback=fallback,
            any_origin=self._origin(fields),
            file=self.file,
            line=fields.line + 1,
        )

    def _name(self, fields: _Fields) -> str:
        name = self._text(fields, "rule")
        line = fields.line_of("rule")
        if "rule" not in fields.values:
            self.fault(line, "the rule has no name", "Begin it with `rule: <name>`")
        elif not _NAME.fullmatch(name):
            message = f"{name!r} is no rule name"
            self.fault(line, message, "Use letters, digits, '_', '-', '.', at most 64")
        elif name in self.places:
            message = f"rule {name!r} is already defined at {self.places[name]}"
            self.fault(line, message, "Give each rule its own name")
        else:
            self.places[name] = f"{self.file}:{line + 1}"
        return name

    # --- conditions

    def _conditions(self, fields: _Fields, *, fallback: bool) -> tuple[Expression, ...]:
        items = self._items(fields, "when")
        if not items and not fallback:
            self.fault(
                fields.line_of("when"),
                "the rule has no conditions and would match every series",
                'Add `when:` with at least one condition; `- "true"` if every series is meant',
            )
        if len(items) > MAX_CONDITIONS:
            self.fault(fields.line_of("when"), f"there are more than {MAX_CONDITIONS} conditions", "Join some")
            return ()
        return tuple(expression for item in items if (expression := self._condition(item)) is not None)

    def _condition(self, node: yaml.Node) -> Expression | None:
        line = node.start_mark.line
        if node.tag.startswith("!"):
            self.fault(line, "YAML takes a leading '!' for a tag", "Put the condition in quotes")
        elif isinstance(node, yaml.MappingNode):
            self.fault(line, "YAML takes ': ' for a key and its value", "Put the condition in quotes")
        elif not isinstance(node, yaml.ScalarNode) or node.tag != f"{_YAML_TYPE}str":
            self.fault(line, "a condition must be text", "Put the condition in quotes")
        else:
            parsed = parse_expression(node.value)
            if isinstance(parsed, Expression):
                return parsed
            for fault in parsed:
                self.fault(self._line_within(node, fault.offset), fault.message, fault.remedy)
        return None

    def _line_within(self, node: yaml.ScalarNode, offset: int) -> int:
        """The line of the file a character of the scalar stands on.

        Folding changes white space only, so the visible characters before it are counted.
        """
        raw = self.text[node.start_mark.index : node.end_mark.index]
        start = raw.find("\n") + 1 if node.style in ("|", ">") else len(node.style or "")
        visible = sum(not letter.isspace() for letter in node.value[:offset])
        for position in range(start, len(raw)):
            if not raw[position].isspace():
                if visible == 0:
                    return int(node.start_mark.line) + raw.count("\n", 0, position)
                visible -= 1
        return int(node.start_mark.line) + raw.rstrip().count("\n")

    def _missing(self, fields: _Fields, conditions: tuple[Expression, ...]) -> frozenset[str]:
        if "missing" not in fields.values:
            return frozenset()
        usable = sorted({r.keyword for c in conditions for r in c.references if not vocabulary.always_there(r.name)})
        policies = self._fields(fields.values["missing"], None, "`missing:`")
        if policies is None:
            return frozenset()
        for name, node in policies.values.items():
            if name not in usable and len(conditions) == len(self._items(fields, "when")):
                remedy = vocabulary.suggestion(name, usable) or f"Names that can be missing: {', '.join(usable) or '-'}"
                self.fault(policies.line_of(name), f"no condition of the rule asks for {name!r}", _sentence(remedy))
            if self._scalar(node) not in ("allow", "refuse"):
                message = f"{self._scalar(node)!r} does not say what an absent {name} means"
                self.fault(node.start_mark.line, message, "Write allow or refuse")
        return frozenset(name for name, node in policies.values.items() if self._scalar(node) == "allow")

    # --- what follows

    def _run(self, fields: _Fields) -> tuple[str, Priority, tuple[str, ...]]:
        if "run" not in fields.values:
            return "", Priority.ROUTINE, ()
        run = self._fields(fields.values["run"], ("engine", "priority", "results"), "`run:`")
        if run is None:
            return "", Priority.ROUTINE, ()
        engine = self._text(run, "engine")
        if "engine" not in run.values:
            self.fault(run.line, "`run:` names no engine", f"Add `engine:`, one of {_listed(self.engines)}")
        else:
            self._known(run.values["engine"], engine, "engine", self.engines, "engines")
        results = tuple(self._scalar(item) for item in self._items(run, "results"))
        for item, result in zip(self._items(run, "results"), results, strict=True):
            self._known(item, result, "kind of result", self.results, "")
        if not results:
            message = "the rule runs an engine and asks for no result"
            self.fault(run.line_of("results"), message, f"Add `results:` with one or more of {', '.join(self.results)}")
        return engine, self._choice(run, "priority", Priority, Priority.ROUTINE), results

    def _send(self, fields: _Fields, *, runs: bool) -> tuple[tuple[str, ...], SendWhat]:
        usual = SendWhat.RESULTS if runs else SendWhat.SOURCE
        if "send" not in fields.values:
            return (), usual
        send = self._fields(fields.values["send"], ("to", "what"), "`send:`")
        if send is None:
            return (), usual
        items = self._items(send, "to")
        names = tuple(dict.fromkeys(self._scalar(item) for item in items))
        if not names:
            self.fault(send.line_of("to"), "`send:` names no destination", "Add `to: [sender]` or a destination")
        for item in items:
            if self._scalar(item) != SENDER:
                self._known(item, self._scalar(item), "destination", [*self.destinations, SENDER], "destinations")
        what = self._choice(send, "what", SendWhat, usual)
        if not runs and what is not SendWhat.SOURCE:
            message = f"the rule runs nothing, so there are no results to send (`what: {what.value}`)"
            self.fault(send.line_of("what"), message, "Write `what: source`, or add `run:`")
        return names, what

    def _origin(self, fields: _Fields) -> bool:
        origin = self._text(fields, "origin") or "received"
        if origin not in ("received", "any"):
            message = f"{origin!r} is no origin"
            self.fault(fields.line_of("origin"), message, "Write received (the default) or any")
        return origin == "any"

    def _known(self, node: yaml.Node, name: str, what: str, known: Collection[str], section: str) -> None:
        if name in known:
            return
        remedy = vocabulary.suggestion(name, known) or f"use one of {_listed(known)}"
        if section:
            remedy += f" (or add it under `{section}:` in the configuration)"
        self.fault(node.start_mark.line, f"{what} {name!r} is not known", _sentence(remedy))

    # --- YAML nodes

    def _fields(self, node: yaml.Node, known: Collection[str] | None, what: str) -> _Fields | None:
        line = node.start_mark.line
        if not isinstance(node, yaml.MappingNode):
            self.fault(line, f"{what} must be keys and values", "See the template among the rules that ship")
            return None
        fields = _Fields(values={}, lines={}, line=line)
        for key_node, value in node.value:
            key, at = self._scalar(key_node), key_node.start_mark.line
            if known is not None and key not in known:
                remedy = vocabulary.suggestion(key, known) or f"Known are {_listed(known)}"
                self.fault(at, f"{what} has no key {key!r}", _sentence(remedy))
            elif key in fields.values:
                self.fault(at, f"the key {key!r} is there twice", "Remove one of them")
            else:
                fields.values[key], fields.lines[key] = value, at
        return fields

    def _items(self, fields: _Fields, key: str) -> list[yaml.Node]:
        node = fields.values.get(key)
        if node is None or node.tag == f"{_YAML_TYPE}null":
            return []
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        self._once(node.start_mark.line, f"`{key}:` must be a list", f"Write `{key}:` and then items with `- `")
        return []

    def _text(self, fields: _Fields, key: str) -> str:
        node = fields.values.get(key)
        if node is None:
            return ""
        if not isinstance(node, yaml.ScalarNode):
            self.fault(node.start_mark.line, f"`{key}:` must be text", "Write it on one line")
            return ""
        return str(node.value).strip()

    def _flag(self, fields: _Fields, key: str) -> bool:
        text = self._text(fields, key).lower()
        if text and text not in _TRUE | _FALSE:
            self.fault(fields.line_of(key), f"`{key}:` is neither true nor false", "Write true or false")
        return text in _TRUE

    def _choice(self, fields: _Fields, key: str, choices: type[_E], usual: _E) -> _E:
        text = self._text(fields, key)
        if key not in fields.values:
            return usual
        try:
            return choices(text)
        except ValueError:
            known = [choice.value for choice in choices]
            remedy = vocabulary.suggestion(text, known) or f"Use one of {', '.join(known)}"
            self.fault(fields.line_of(key), f"`{key}: {text}` is not known", _sentence(remedy))
            return usual

    def _scalar(self, node: yaml.Node) -> str:
        return str(node.value).strip() if isinstance(node, yaml.ScalarNode) else "a list or mapping"

    def _once(self, line: int, message: str, remedy: str) -> None:
        said = (self.file, line + 1, message)
        if all((p.file, p.line, p.message) != said for p in self.problems):
            self.fault(line, message, remedy)


def _too_deep(text: str) -> int | None:
    """The line at which too many brackets are open, counted crudely: PyYAML takes quadratic time over them."""
    depth = 0
    for position, letter in enumerate(text):
        if letter in "[{":
            depth += 1
            if depth > MAX_BRACKETS:
                return text.count("\n", 0, position)
        elif letter in "]}":
            depth = max(0, depth - 1)
    return None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none (none is configured)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
