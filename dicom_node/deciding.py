"""How settings become rules and a router: what the service and the commands share. Part of the composition root.

Apart from `wiring` because the rules' expression library is slow to load and the receiver needs none of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError
from dicom_node.interfaces import Clock
from dicom_node.model import BootTime, StudyActivity
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.observe import Observer
from dicom_node.pipeline.route import Router
from dicom_node.plugins import encoder_kinds
from dicom_node.routing.completion import Due, due
from dicom_node.routing.load import load_rules
from dicom_node.routing.rules import RuleSet, unreachable_senders
from dicom_node.store.catalog import Catalog

__all__ = [
    "destination_of",
    "due_now",
    "keep_rules",
    "kept_rules",
    "node_router",
    "node_rules",
    "sender_warnings",
    "zone",
]

RULES_IN_FORCE = "rules_in_force.json"


def destination_of(config: NodeConfig) -> Callable[[str], str | None]:
    """AE title to the name of the destination that has it, for rules that send to the `sender`."""
    names = {settings.ae_title: name for name, settings in reversed(list(config.destinations.items()))}
    return names.get


def zone(config: NodeConfig) -> timezone:
    """`time_zone` as the clock's."""
    sign = -1 if config.time_zone[0] == "-" else 1
    return timezone(sign * timedelta(hours=int(config.time_zone[1:3]), minutes=int(config.time_zone[3:5])))


def node_rules(config: NodeConfig, folder: Path | None = None) -> RuleSet:
    """The rules of the configuration, or those of `folder`. Raises RuleError, ConfigError."""
    where = folder or config.resolved_rules_dir()
    return load_rules(where, engines=config.engines, destinations=config.destinations, results=encoder_kinds())


def sender_warnings(config: NodeConfig, rules: RuleSet) -> list[str]:
    """What to know of rules that send to a `sender` who can be nobody; see `routing.rules.unreachable_senders`."""
    peers = [peer.ae_title for peer in config.peers.values()]
    return unreachable_senders(rules, peers, [one.ae_title for one in config.destinations.values()])


def keep_rules(config: NodeConfig, rules: RuleSet) -> None:
    """Keep the text of the rules in force in the data folder, replaced whole, for `kept_rules`.

    Only the service process calls it. Raises OSError when it cannot be written, ConfigError when the folder changed
    since `rules` were read; what was kept before then stays.
    """
    paths = [path for path in config.resolved_rules_dir().glob("[!.]*.yaml") if path.is_file()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    if _rules_of(config, texts).digest != rules.digest:
        raise ConfigError("rules folder: its files changed while they were read; reload the rules")
    final = config.data_dir / RULES_IN_FORCE
    temporary = final.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"digest": rules.digest, "files": texts}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(final)


def kept_rules(config: NodeConfig) -> RuleSet:
    """The rules last kept. Raises ConfigError when there are none or they do not fit the settings, RuleError."""
    path = config.data_dir / RULES_IN_FORCE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        digest, rules = kept["digest"], _rules_of(config, kept["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(f"{path}: no rules were kept; correct the rules folder") from exc
    if rules.digest != digest:
        raise ConfigError(f"{path}: not what was kept; correct the rules folder")
    return rules


def _rules_of(config: NodeConfig, texts: Mapping[str, str]) -> RuleSet:
    with TemporaryDirectory(prefix="dicom-node-rules-") as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return node_rules(config, Path(folder))


def due_now(config: NodeConfig, clock: Clock) -> Callable[[StudyActivity], Due]:
    """Whether a study is complete at the time of asking."""
    return lambda activity: due(activity, config.completion, clock.boot())


class _LocalClock:
    """The node's clock with its wall time in the node's zone: what `now.getHours()` in a rule means."""

    def __init__(self, clock: Clock, here: timezone) -> None:
        self._clock = clock
        self._here = here

    def boot(self) -> BootTime:
        return self._clock.boot()

    def wall(self) -> datetime:
        return self._clock.wall().astimezone(self._here)

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds)


def node_router(
    catalog: Catalog, config: NodeConfig, rules: Callable[[], RuleSet], clock: Clock, observer: Observer
) -> Router:
    """The router on the node's catalog; `rules` gives the set in force."""
    return Router(
        catalog.queue,
        read_header=read_series_header,
        due=due_now(config, clock),
        rules=rules,
        destination_of=destination_of(config),
        clock=_LocalClock(clock, zone(config)),
        observer=observer,
    )
