"""The command line: what can be said, and where it is done (`commands`, imported only when a command runs).

Every failure is one line on standard error, `dicom-node: ...`, and exit status 2; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from dicom_node.errors import NodeError

__all__ = ["main"]

OK = 0
FAILED = 2

# the module that does a command, where it is not `commands`
_MODULES = {
    "send": "transfers",
    "fetch": "transfers",
    "ledger": "operations",
    "backup": "operations",
    "restore": "operations",
    "retention": "retaining",
    "delete": "retaining",
    "doctor": "doctor",
    "users_hash": "user_commands",
    "users_check": "user_commands",
    "audit_verify": "audit_commands",
}

_SETTINGS = argparse.ArgumentParser(add_help=False)
_SETTINGS.add_argument(
    "--config",
    metavar="FILE",
    help="settings (default: config/node.yaml, else /etc/dicom-node/node.yaml, where it exists)",
)
_SETTINGS.add_argument("--data-dir", metavar="DIR", help="where the node keeps everything (default: data)")
_SETTINGS.add_argument("--rules", metavar="DIR", help="routing rules (default: routing_rules where it exists)")
_SETTINGS.add_argument("--ae-title", metavar="AET", action="append", help="own AE title; may be repeated")
_SETTINGS.add_argument("--host", metavar="ADDRESS", help="address of the DICOM port (default: 127.0.0.1)")
_SETTINGS.add_argument("--dicom-port", metavar="PORT", type=int, help="0 = any free one (default: 11112)")
_SETTINGS.add_argument("--http-port", metavar="PORT", type=int, help="0 = any free one (default: 8080)")
_SETTINGS.add_argument("--wire", choices=("own", "pynetdicom"), help="upper layer that carries DICOM (default: own)")
_SETTINGS.add_argument("--receivers", metavar="N", type=int, help="processes that take associations (default: 1)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo"]:  # it has a command line of its own
        return _guarded(_demo, words[1:])
    second = words[1] if len(words) > 1 else "--"
    if words[:1] in (["jobs"], ["deliveries"]) and second.startswith("-") and second not in ("-h", "--help"):
        words.insert(1, "list")
    arguments = _parser().parse_args(words)
    return _guarded(_run, arguments)


def _guarded(run: Callable[[Any], int], argument: Any) -> int:
    try:
        return run(argument)
    except NodeError as exc:
        return _failed(str(exc))
    except KeyboardInterrupt:
        return _failed("interrupted")
    except BrokenPipeError:  # `dicom-node jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as exc:
        return _failed(f"{exc.filename or 'system'}: {exc.strerror or type(exc).__name__}")
    except Exception as exc:  # the edge of the command line; the text of foreign errors may hold patient data
        if os.environ.get("PYTHONDEVMODE"):
            raise
        trace = exc.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
        return _failed(f"internal error: {type(exc).__name__} at {where}; PYTHONDEVMODE=1 shows all of it")


def _failed(message: str) -> int:
    print(f"dicom-node: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


def _demo(words: list[str]) -> int:
    from dicom_node.demo.tour import main as tour

    return int(tour(words) or 0)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.run == "version":
        print(f"dicom-node {version('dicom-node')}")
        return OK
    module = _MODULES.get(arguments.run, "commands")
    for group in ("model", "engine"):
        if arguments.run.startswith(f"{group}s_"):
            module = f"{group}_commands"
    run: Callable[[argparse.Namespace], int] = getattr(import_module(f"dicom_node.{module}"), arguments.run)
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dicom-node", description="A DICOM node that keeps, routes and analyses.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: str, text: str, under: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = under.add_parser(name, help=text, description=text, parents=[_SETTINGS])
        made.set_defaults(run=run)
        return made

    def group(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text).add_subparsers(metavar="ACTION", required=True)

    command("serve", "serve", "Run the node until SIGTERM or Ctrl-C.")
    _wire_commands(command)
    _study_commands(command)
    _user_commands(command, group)
    _queue_commands(command, group)
    rules = group("rules", "The routing rules.")
    command("check", "rules_check", "Check the rules; say file, line and remedy of what is wrong.", rules)
    explain = command("explain", "rules_explain", "Every rule and condition for a study, and why.", rules)
    explain.add_argument("study", metavar="STUDY")
    replay = command("replay", "rules_replay", "Run a rule set over the history without doing anything.", rules)
    replay.add_argument("--since", default="7d", metavar="AGE", help="such as 12h or 7d (default)")
    command("reload", "rules_reload", "Let the running node take the rules in.", rules)
    _model_commands(command, group)
    _engine_commands(command, group)
    config = group("config", "The settings.")
    command("check", "config_check", "Check the settings and show what holds.", config)
    commands.add_parser("demo", help="Show the whole line on phantoms, or on your own files.", add_help=False)
    fsck = command("fsck", "fsck", "Check the index against the files, with the node stopped.")
    fsck.add_argument("--repair", action="store_true", help="index the files that have no row")
    fsck.add_argument("--quick", action="store_true", help="compare sizes only, do not read every byte")
    command("doctor", "doctor", "Look at everything the node needs; say what is wrong and what to do.")
    backup = command("backup", "backup", "Save the catalog, while the node runs; copy the archive folder after it.")
    backup.add_argument("path", metavar="PATH", help="a file that is not there yet")
    restore = command("restore", "restore", "Bring a saved catalog back, with the node stopped; overwrites nothing.")
    restore.add_argument("path", metavar="PATH", help="what `backup` wrote")
    audit = group("audit", "The audit trail.")
    check = command("verify", "audit_verify", "Whether the audit trail is what was written; exit status 2: no.", audit)
    check.add_argument("--folder", metavar="DIR", help="a copy of it (default: the node's own)")
    check.add_argument(
        "--anchor", action="append", default=[], metavar="N:HASH", help="a head that the log or a verification told"
    )
    command("version", "version", "The version.")
    return parser


def _user_commands(command: Callable[..., argparse.ArgumentParser], group: Callable[[str, str], Any]) -> None:
    users = group("users", "The users that associations may be for.")
    for verb, text in (
        ("hash", "Print a line for the users file; asks for the passcode, or reads it from standard input."),
        ("check", "Whether a passcode is that user's; asks for it, or reads it from standard input."),
    ):
        action = command(verb, f"users_{verb}", text, users)
        action.add_argument("name", metavar="NAME")


TLS_HELP = "over TLS, with the certificate, key and authorities of `tls` in the configuration"


def _wire_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    send = command("send", "send", "Send DICOM files to a node or PACS (C-STORE).")
    send.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders to look through")
    send.add_argument("--to", required=True, metavar="HOST:PORT/AET")
    send.add_argument("--tls", action="store_true", help=TLS_HELP)
    fetch = command("fetch", "fetch", "Fetch a study from a node or PACS (C-GET).")
    fetch.add_argument("study", metavar="STUDY", help="Study Instance UID")
    fetch.add_argument("--from", required=True, metavar="HOST:PORT/AET", dest="origin")
    fetch.add_argument("--tls", action="store_true", help=TLS_HELP)
    for asking in (send, fetch):
        asking.add_argument("--user", metavar="NAME", help="come as this user (User Identity Negotiation)")
        asking.add_argument("--passcode-env", metavar="VARIABLE", help="the variable that holds the user's passcode")
        asking.add_argument("--jwt-file", metavar="FILE", help="come with the JSON Web Token in this file (mode 0600)")
        asking.add_argument("--allow-plain", action="store_true", help="tell the secret without TLS, also elsewhere")
    fetch.add_argument("--into", metavar="DIR", help="folder for the files (default: one named like the study)")


def _study_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    route = command("route", "route", "Close a study and route it now.")
    route.add_argument("study", metavar="STUDY", help="Study Instance UID")
    route.add_argument("--rule", metavar="RULE", help="only this rule")
    route.add_argument("--again", action="store_true", help="run again although the input is the same")
    timeline = command("timeline", "timeline", "What happened to a study, and when.")
    timeline.add_argument("study", metavar="STUDY", help="Study Instance UID")
    release = command("release", "release", "Let a study with an identity conflict be analysed.")
    release.add_argument("study", metavar="STUDY", help="Study Instance UID")
    delete = command("delete", "delete", "Delete studies for good; refused while deliveries of them are open.")
    delete.add_argument("study", nargs="+", metavar="STUDY", help="Study Instance UID")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    delete.add_argument("--dry-run", action="store_true", help="say whether it would be deleted, and why not")
    delete.add_argument(
        "--break-commitment", action="store_true", help="also what the node committed to keeping, as asked by a peer"
    )
    retention = command("retention", "retention", "Run the rules of retention now; say what goes, what stays, and why.")
    retention.add_argument("--dry-run", action="store_true", help="delete nothing")
    retention.add_argument("--json", action="store_true", help="the same for programs")
    ledger = command("ledger", "ledger", "What was received, from whom and when, and what became of it.")
    ledger.add_argument("--since", default="24h", metavar="AGE", help="such as 12h or 7d (default: 24h), or `ever`")
    ledger.add_argument("--json", action="store_true", help="the same for programs")
    status = command("status", "status", "Studies, jobs, deliveries, what is stuck and why, on one screen.")
    status.add_argument("--json", action="store_true", help="the same for programs")


def _queue_commands(command: Callable[..., argparse.ArgumentParser], group: Callable[[str, str], Any]) -> None:
    for name, noun in (("jobs", "job"), ("deliveries", "delivery")):
        actions = group(name, f"List, retry or cancel {name}.")
        listing = command("list", f"{name}_list", "Newest first.", actions)
        listing.add_argument("--study", metavar="STUDY", help="only of this study")
        listing.add_argument("--limit", type=int, default=30, metavar="N")
        for verb, text in (("retry", "Try it again."), ("cancel", "Give it up.")):
            action = command(verb, f"{name}_{verb}", text, actions)
            action.add_argument("id", type=int, nargs="+", metavar="ID", help=f"{noun} ids")


def _model_commands(command: Callable[..., argparse.ArgumentParser], group: Callable[[str, str], Any]) -> None:
    models = group("models", "The model packages.")
    command("list", "models_list", "The models there are, which are enabled, and the engines that run them.", models)
    check = command("check", "models_check", "Whether engines could run; what a package is, with self-test.", models)
    check.add_argument("name", nargs="?", metavar="ENGINE|ID|DIR|ZIP|FILE", help="default: every configured engine")
    check.add_argument("--write", action="store_true", help="write a foreign package's model.yaml, to be corrected")
    add = command("import", "models_import", "Install a package after its check and self-test.", models)
    add.add_argument("path", metavar="DIR|ZIP|FILE")
    add.add_argument("--sha256", default="", metavar="HEX", help="what the zip or file must have")
    add.add_argument("--enable", action="store_true", help="switch to it although another version is enabled")
    for action in (check, add):
        action.add_argument("--no-self-test", action="store_true", help="do not run the package's network")
        action.add_argument("--device", metavar="DEVICE", help="for the self-test (default: the first of jobs.devices)")
    for verb, text, metavar in (
        ("remove", "Delete an installed model or one version of it.", "ID[@VERSION]"),
        ("enable", "Let a model run, or switch to a version of it; running jobs finish on theirs.", "ID[@VERSION]"),
        ("disable", "Keep a model from running.", "ID"),
    ):
        action = command(verb, f"models_{verb}", text, models)
        action.add_argument("model", metavar=metavar)
        if verb == "remove":
            action.add_argument("--force", action="store_true", help="also the enabled version")


def _engine_commands(command: Callable[..., argparse.ArgumentParser], group: Callable[[str, str], Any]) -> None:
    engines = group("engines", "The engines, in the node and outside it.")
    command("list", "engines_list", "Every engine, how it is now, and its jobs.", engines)
    check = command("check", "engines_check", "Whether an engine could run, and what it says of itself.", engines)
    check.add_argument("name", nargs="?", metavar="NAME", help="default: every configured engine")
    run = command(
        "run", "engines_run", "Run an engine on a study that is here, by hand, and print its answer.", engines
    )
    run.add_argument("name", metavar="NAME")
    run.add_argument("study", metavar="STUDY", help="Study Instance UID")
    run.add_argument("--series", metavar="SERIES", help="only this Series Instance UID")
    run.add_argument("--out", metavar="DIR", help="write the results there as DICOM files")
    run.add_argument("--results", nargs="+", metavar="KIND", help="kinds of result to make (default: all but labelmap)")
    run.add_argument("--store", action="store_true", help="keep the results in the node; nothing is sent anywhere")
    run.add_argument("--timeout", type=float, metavar="S", help="for each series (default: the engine's timeout_s)")
    model = command("aiaa-model", "engines_aiaa_model", "Look at, load or remove a model of an AIAA server.", engines)
    model.add_argument("verb", choices=("get", "put", "patch", "delete"), metavar="get|put|patch|delete")
    model.add_argument("name", metavar="NAME", help="the engine, of kind aiaa")
    model.add_argument("model", nargs="?", metavar="MODEL", help="default: the engine's own model")
    model.add_argument("--model-config", metavar="FILE", help="config_aiaa.json, for put and patch")
    model.add_argument("--model-data", metavar="FILE", help="the model itself (model.ts, model.trt.pb), for put")
    model.add_argument("--yes", action="store_true", help="delete without asking")


if __name__ == "__main__":
    sys.exit(main())
