"""What `dicom-node doctor` says of the node's HTTP: who may read it, and what /ready answers. Composition root."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dicom_node.config import NodeConfig, is_loopback
from dicom_node.doctor import Finding, State
from dicom_node.http.token import read_token

__all__ = ["http_settings", "reachable", "ready"]

ANSWER_S = 5.0


def http_settings(config: NodeConfig) -> Iterator[Finding]:
    """Who may read /ready and /metrics. Raises ConfigError for a token that is none."""
    host, what = config.monitoring_host(), "configuration"
    if config.http_token_env or config.http_token_file:
        read_token(config.http_token_env, config.http_token_file)
        text = f"/ready and /metrics ask for a token on {host}"
        if is_loopback(host):
            yield Finding(what=what, state=State.OK, text=text)
        else:
            remedy = "put a proxy with TLS before it where others share the network (README, Decisions)"
            yield Finding(what=what, state=State.NOTE, text=f"{text}, which travels in clear", remedy=remedy)
    elif not is_loopback(host):
        text, remedy = f"whoever reaches {host} reads /ready and /metrics", "set http_token_file"
        yield Finding(what=what, state=State.NOTE, text=text, remedy=remedy)


def ready(config: NodeConfig, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """What the running node's /ready answers; `facts` of its supervisor tell the port."""
    key = "http_port" if config.metrics_port is None else "metrics_port"
    host, port = reachable(config.monitoring_host()), int(facts.get(key, config.metrics_port or config.http_port))
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/ready", headers=_authorization(config))
        answer = connection.getresponse()
        body = json.loads(answer.read(1 << 20))
    except (OSError, http.client.HTTPException, ValueError) as exc:
        text = f"{host}:{port} does not answer ({type(exc).__name__})"
        yield Finding(what=key, state=State.WRONG, text=text, remedy="see the node's log")
        return
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.UNAUTHORIZED:
        text, remedy = f"{host}:{port} does not take the token", "restart the node: it runs with another configuration"
        yield Finding(what=key, state=State.WRONG, text=text, remedy=remedy)
        return
    checks = body.get("checks") if isinstance(body, dict) else None
    if checks is None:  # too busy, or not this node's
        text = f"{host}:{port} answers /ready with status {answer.status} and no checks"
        yield Finding(what=key, state=State.WRONG, text=text, remedy="see what listens there, and the node's log")
        return
    for check in checks:
        what, detail = f"ready: {check['name']}", str(check.get("detail", ""))
        if check["ok"]:
            yield Finding(what=what, state=State.OK, text=detail or "yes")
        else:
            remedy = "dicom-node status, and the node's log"
            yield Finding(what=what, state=State.WRONG, text=detail or "no", remedy=remedy)


def reachable(host: str) -> str:
    """Where a port is asked that is bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _authorization(config: NodeConfig) -> Mapping[str, str]:
    if not (config.http_token_env or config.http_token_file):
        return {}
    return {"Authorization": f"Bearer {read_token(config.http_token_env, config.http_token_file)}"}
