"""What the node's HTTP port answers to engines: images laid out for them, and word that they are through.

Nothing of it is there unless `http_public_url` is set or an engine has a public URL of its own. Part of the composition
root; imported only where it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dicom_node.config import NodeConfig
from dicom_node.engines.handed_out import Links, Shelf, shelf_and_signer
from dicom_node.engines.webhooks import Webhooks
from dicom_node.errors import NodeError
from dicom_node.http.health import Mount
from dicom_node.interfaces import Clock
from dicom_node.plugins import is_own_engine

__all__ = ["Shelving", "for_engines", "is_needed", "mounts"]

log = logging.getLogger(__name__)

FORGOTTEN_S = 3600.0  # a job writes its name down before it lays anything out, but not always in the same moment


def is_needed(config: NodeConfig) -> bool:
    """Whether an engine may come to the HTTP port."""
    own = (engine for engine in config.engines.values() if is_own_engine(engine.kind) and engine.kind != "local")
    return any(config.http_public_url or engine.options.get("public_url") for engine in own)


def for_engines(config: NodeConfig, clock: Clock) -> Mapping[str, Any]:
    """Keyword arguments of the node's own engine kinds: where to lay images out, and where to be told."""
    url = config.http_public_url
    if not url:
        return {}
    return {
        "links": shelf_and_signer(config.data_dir, clock, base_url=url),
        "webhooks": Webhooks(config.data_dir, clock, base_url=url, wake=lambda job: None),
    }


def mounts(config: NodeConfig, clock: Clock, wake: Callable[[int], object]) -> Mapping[str, Mount]:
    """What the HTTP server is to answer by prefix; `wake(job)` has a waiting job looked at now."""
    if not is_needed(config):
        return {}
    shelf, signer = shelf_and_signer(config.data_dir, clock)
    return {Links.prefix: Links(signer, shelf), Webhooks.prefix: Webhooks(config.data_dir, clock, wake=wake)}


class Shelving:
    """Takes off the shelf what was laid out for jobs that have ended: an engine that died did not do it."""

    def __init__(
        self, config: NodeConfig, clock: Clock, still_wanted: Callable[[], tuple[frozenset[int], str]]
    ) -> None:
        self._shelf: Shelf = shelf_and_signer(config.data_dir, clock)[0]
        self._still_wanted = still_wanted

    def sweep(self) -> int:
        """How many jobs' objects were taken away. Raises nothing: the next sweep tries again."""
        try:
            old = [name for name in self._shelf.jobs() if self._shelf.age_s(name) > FORGOTTEN_S]
            if not old:
                return 0
            jobs, told = self._still_wanted()
            forgotten = {name for name in old if not _is_wanted(name, jobs, told)}
            gone = self._shelf.keep_only([name for name in self._shelf.jobs() if name not in forgotten])
        except NodeError as exc:
            log.warning("the shelf of images laid out for engines could not be looked through", exc_info=exc)
            return 0
        if gone:
            log.info("images laid out for engines were taken back", extra={"jobs": gone})
        return gone


def _is_wanted(name: str, jobs: frozenset[int], told: str) -> bool:
    """Names end with the number of a job or with a token that its engine's note carries."""
    end = name.rpartition("-")[2]
    return (end.isdecimal() and int(end) in jobs) or (bool(end) and end in told)
