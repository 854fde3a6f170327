"""Settings: `config/node.yaml`, then `DICOM_NODE_*` variables, then flags; checked, frozen, every key with a default.

An unknown key, a wrong type or a name that leads nowhere is a ConfigError that says the key, the value and what is
expected. This file knows no part of the node.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dicom_node.access_settings import BoundSettings, JwtSettings, UserIdentitySettings
from dicom_node.errors import ConfigError
from dicom_node.model import ConflictPolicy, Destination, TlsClient
from dicom_node.retention import RetentionSettings
from dicom_node.settings import (
    AeTitle,
    AuditSettings,
    CollectorSettings,
    CommitmentSettings,
    CompletionOverride,
    CompletionSettings,
    DeliverySettings,
    DestinationSettings,
    EngineSettings,
    FindSettings,
    JobSettings,
    Name,
    PeerSettings,
    Port,
    RateSettings,
    Seconds,
    Settings,
    StorageSettings,
    TimeZone,
    TlsClientSettings,
    TlsSettings,
    UserSettings,
)

__all__ = [
    "AuditSettings",
    "BoundSettings",
    "CollectorSettings",
    "CommitmentSettings",
    "CompletionOverride",
    "CompletionSettings",
    "DeliverySettings",
    "DestinationSettings",
    "EngineSettings",
    "FindSettings",
    "JobSettings",
    "JwtSettings",
    "NodeConfig",
    "PeerSettings",
    "RateSettings",
    "RetentionSettings",
    "StorageSettings",
    "TlsClientSettings",
    "TlsSettings",
    "UserIdentitySettings",
    "UserSettings",
    "is_loopback",
    "load_config",
    "packaged",
]


def packaged(*parts: str) -> Path:
    """A file or folder that ships inside the package (default rules, demonstration weights)."""
    return Path(__file__).parent.joinpath(*parts)


class NodeConfig(Settings):
    """Everything the node can be told."""

    ae_titles: Annotated[tuple[AeTitle, ...], Field(min_length=1)] = ("DICOM_NODE",)
    any_called_ae_title: bool = False
    host: str = "127.0.0.1"
    dicom_port: Port = 11112
    http_host: str = "127.0.0.1"
    http_port: Port = 8080
    http_token_env: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = ""
    http_token_file: Path | None = None
    """Where the bearer token is that /ready and /metrics ask for; neither: they ask for none."""
    http_without_token: bool = False
    """Let other machines read /ready and /metrics though nothing is asked of them."""
    metrics_host: str = ""
    """'' = `http_host`."""
    metrics_port: Port | None = None
    """A port: /ready and /metrics are there and no longer on `http_port`. null: all is on `http_port`."""
    http_public_url: Annotated[str, Field(pattern=r"^(https?://[^\s/?#@]+(/[^\s?#]*)?)?$")] = ""
    """How engines elsewhere reach the HTTP port, through whatever stands before it: for those that fetch images from
    here or tell that they are through. '' = none does, and the port answers nothing to them."""
    data_dir: Path = Path("data")
    rules_dir: Path | None = None
    """null = `routing_rules/` in the current folder if it exists, else the rules that ship with the package."""
    time_zone: TimeZone = "+0000"
    """UTC offset of results whose source has no Timezone Offset From UTC (0008,0201)."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    wire: Literal["own", "pynetdicom"] = "own"
    """Which upper layer carries DICOM: the node's own, or pynetdicom's, which is slower and for trusted networks."""
    tls: TlsSettings | None = None
    """null: DICOM is not encrypted."""
    allow_any_peer: bool = False
    """Let the DICOM port be reached from other machines though anybody may use it."""
    receivers: Annotated[int, Field(ge=1, le=32)] = 1
    """Processes that take associations, all from the one DICOM port. More than one pays where cores are to spare."""
    max_associations: Annotated[int, Field(ge=1)] = 1000
    """At the same time, in all receivers together."""
    max_pdu_bytes: Annotated[int, Field(ge=4096)] = 131072
    association_idle_timeout_s: Seconds = 60.0
    unknown_sop_classes: bool = False
    """Accept storage of SOP classes the Standard does not list (private ones)."""
    extra_sop_classes: tuple[str, ...] = ()
    """Accept storage of these SOP Class UIDs too."""
    conflict_policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST
    analyse_identity_conflicts: bool = False
    """Analyse studies that arrived under two patient identities without a person's release."""
    peers: Mapping[Name, PeerSettings] = Field(default_factory=dict)
    user_identity: UserIdentitySettings | None = None
    """null: whom an association says it is for is not looked at."""
    bounds: BoundSettings = BoundSettings()
    destinations: Mapping[Name, DestinationSettings] = Field(default_factory=dict)
    engines: Mapping[Name, EngineSettings] = Field(
        default_factory=lambda: {
            "ct-abdomen": EngineSettings(model="demo-ct-abdomen"),
            "cxr-findings": EngineSettings(model="demo-cxr-findings"),
        }
    )
    find: FindSettings = FindSettings()
    completion: CompletionSettings = CompletionSettings()
    storage: StorageSettings = StorageSettings()
    jobs: JobSettings = JobSettings()
    delivery: DeliverySettings = DeliverySettings()
    audit: AuditSettings | None = None
    """null: no audit trail is kept."""
    retention: RetentionSettings | None = None
    """null: everything is kept until a person deletes it."""

    @model_validator(mode="after")
    def _open_only_to_loopback(self) -> NodeConfig:
        asks_for_certificates = self.tls is not None and self.tls.client_auth == "required" and self.tls.port is None
        if not (self.peers or asks_for_certificates or self.allow_any_peer or is_loopback(self.host)):
            raise ValueError(
                f"host: {self.host!r} is reachable from other machines but no peers are configured; "
                "list who may connect under `peers:`, or let only TLS with client certificates in (`tls:` without a "
                "port of its own), or bind 127.0.0.1; `allow_any_peer: true` lets everybody in"
            )
        if self.peers and self.allow_any_peer:
            raise ValueError("allow_any_peer: peers are configured, so only they may connect; remove one of the two")
        return self

    @model_validator(mode="after")
    def _peers_can_be_told_apart(self) -> NodeConfig:
        first: dict[str, tuple[str, PeerSettings]] = {}
        for name, peer in self.peers.items():
            known, other = first.setdefault(peer.ae_title, (name, peer))
            if known == name:
                continue
            if not (peer.hosts and other.hosts):
                raise ValueError(
                    f"peers.{name}: AE title {peer.ae_title!r} is given to {known!r} too; "
                    "name the hosts of both, or make one entry"
                )
            for key in _OF_A_TITLE:
                if getattr(peer, key) != getattr(other, key):
                    raise ValueError(
                        f"peers.{name}.{key}: {known!r} has the same AE title {peer.ae_title!r} and another {key}; "
                        "make them equal: it is looked up by the title alone"
                    )
        return self

    @model_validator(mode="after")
    def _moves_go_where_they_may(self) -> NodeConfig:
        for name, peer in self.peers.items():
            allowed = set(peer.move_destinations or ())
            if unknown := sorted(allowed - set(self.destinations)):
                raise ValueError(
                    f"peers.{name}.move_destinations: there is no destination {unknown[0]!r} "
                    f"(known: {', '.join(sorted(self.destinations)) or 'none'})"
                )
            titles = {self.destinations[one].ae_title: one for one in sorted(allowed)}
            for other, destination in self.destinations.items():
                if other not in allowed and (known := titles.get(destination.ae_title)) is not None:
                    raise ValueError(
                        f"peers.{name}.move_destinations: {known!r} and {other!r} have the same AE title "
                        f"{destination.ae_title!r}, and a C-MOVE names no more; allow both, or give them two titles"
                    )
        return self

    @model_validator(mode="after")
    def _users_can_prove_themselves(self) -> NodeConfig:
        for name, peer in self.peers.items():
            if self.user_identity is None and (peer.user_identity not in (None, "off") or peer.users):
                raise ValueError(
                    f"peers.{name}: it is to come for users, and nothing says how they prove who they are; "
                    "set `user_identity:` with a users_file or a jwt block"
                )
        asked = self.user_identity
        in_clear = self.tls is None and not is_loopback(self.host)
        if asked is not None and in_clear and not asked.allow_plain and set(asked.kinds) != {"username"}:
            raise ValueError(
                f"user_identity: on {self.host!r} without `tls:` passcodes and tokens cross the network in clear; "
                "set `tls:`, or user_identity.allow_plain: true where the network itself is safe"
            )
        return self

    @model_validator(mode="after")
    def _http_asks_who_is_there(self) -> NodeConfig:
        if self.http_token_env and self.http_token_file:
            raise ValueError("http_token_env and http_token_file are both set; keep one")
        if self.http_token_env.startswith("DICOM_NODE_"):
            raise ValueError("http_token_env: variables that begin with DICOM_NODE_ are settings; use another name")
        if self.metrics_host and self.metrics_port is None:
            raise ValueError("metrics_host: /ready and /metrics are on http_port; set metrics_port too")
        asks = bool(self.http_token_env or self.http_token_file)
        if asks and self.http_without_token:
            raise ValueError("http_without_token: a token is set, so it is asked for; remove one of the two")
        host = self.monitoring_host()
        if not (asks or self.http_without_token or is_loopback(host)):
            key = "http_host" if host == self.http_host else "metrics_host"
            raise ValueError(
                f"{key}: /ready and /metrics would be open to other machines on {host!r}; set http_token_file (or "
                "http_token_env) and give Prometheus the same token, or leave them on this machine with metrics_host: "
                "127.0.0.1 and a metrics_port; `http_without_token: true` lets everybody read them"
            )
        return self

    def monitoring_host(self) -> str:
        """The address where /ready and /metrics are."""
        return self.metrics_host or self.http_host

    @model_validator(mode="after")
    def _no_secret_in_clear(self) -> NodeConfig:
        for name, engine in self.engines.items():
            if (key := _in_clear(engine.options)) is not None:
                raise ValueError(
                    f"engines.{name}.options.{key}: a secret must not be given as a value; write env:NAME or "
                    "file:/absolute/path"
                )
        return self

    @model_validator(mode="after")
    def _tls_where_it_can_be(self) -> NodeConfig:
        asks = [f"destinations.{name}.tls" for name, one in self.destinations.items() if one.tls is not False]
        asks += [f"peers.{name}.report_tls" for name, one in self.peers.items() if one.report_tls is not False]
        asks += ["tls"] if self.tls is not None else []
        if self.wire == "pynetdicom" and asks:
            raise ValueError(f"{asks[0]}: pynetdicom's wire carries no TLS; set `wire: own`")
        bound = [name for name, peer in self.peers.items() if peer.certificates]
        if bound and (self.tls is None or self.tls.client_auth == "none"):
            raise ValueError(
                f"peers.{bound[0]}.certificates: nobody is asked for a certificate; "
                "set `tls:` with client_auth: required"
            )
        return self

    def client_tls(self, asked: bool | TlsClientSettings) -> TlsClient | None:
        """How an AE is called that is configured with `asked`; None: not over TLS."""
        if asked is False:
            return None
        own = asked if isinstance(asked, TlsClientSettings) else TlsClientSettings()
        pair: TlsSettings | TlsClientSettings | None = own if own.certificate is not None else self.tls
        ca = own.ca or (self.tls.ca if self.tls is not None else None)
        return TlsClient(
            ca=str(ca or ""),
            certificate=str((pair and pair.certificate) or ""),
            key=str((pair and pair.key) or ""),
            key_passphrase_env=pair.key_passphrase_env if pair else "",
            key_passphrase_file=str((pair and pair.key_passphrase_file) or ""),
            server_name=own.server_name or "",
            profile=self.tls.profile if self.tls is not None else "bcp195",
        )

    def destination(self, name: str) -> Destination:
        """The destination of that name. Raises ConfigError."""
        try:
            found = self.destinations[name]
        except KeyError:
            known = ", ".join(sorted(self.destinations)) or "none"
            raise ConfigError(f"destination {name!r} is not configured (known: {known})") from None
        return Destination(
            name=name,
            ae_title=found.ae_title,
            host=found.host,
            port=found.port,
            calling_ae_title=found.calling_ae_title or self.ae_titles[0],
            tls=self.client_tls(found.tls),
            commitment=found.commitment(),
            user=found.user.credentials() if found.user is not None else None,
        )

    def committed_to(self) -> Mapping[str, Destination]:
        """The peers that may ask for storage commitment, by AE title: where each takes its reports."""
        return {
            peer.ae_title: Destination(
                name=name,
                ae_title=peer.ae_title,
                host=peer.report_host,
                port=peer.report_port,
                tls=self.client_tls(peer.report_tls),
            )
            for name, peer in self.peers.items()
            if peer.storage_commitment
        }

    def asked_to_commit(self) -> Mapping[str, frozenset[str]]:
        """The names of the destinations that are asked for storage commitment, by their AE title."""
        found: dict[str, frozenset[str]] = {}
        for name, destination in self.destinations.items():
            if destination.storage_commitment:
                found[destination.ae_title] = found.get(destination.ae_title, frozenset()) | {name}
        return found

    def resolved_rules_dir(self) -> Path:
        """The folder rules are read from. Raises ConfigError when it is missing."""
        folder = self.rules_dir
        if folder is None:
            local = Path("routing_rules")
            folder = local if local.is_dir() else packaged("default_rules")
        if not folder.is_dir():
            raise ConfigError(f"rules_dir: {folder} does not exist; create it (an empty one is a plain archive)")
        return folder


# what is looked up by the calling AE title, whatever network it comes from
_OF_A_TITLE = ("is_engine", "conflict_policy", "storage_commitment", "report_host", "report_port", "report_tls")


_SECRET = re.compile(
    r"(^|[_-])(token|secret|pwd|pass(word|phrase|code|wd)|(api|secret|private|access)[_-]?key|credentials?|authorization)$",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # apiKey is api_key
_PASSWORD_IN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]*:[^\s/?#@]+@")


def _in_clear(options: Any, above: str = "") -> str | None:
    """The key of the first option that holds a secret, by its name or as a URL, and not only where one lies."""
    if isinstance(options, Mapping):
        pairs = [(str(key), value) for key, value in options.items()]
    elif isinstance(options, list | tuple):
        pairs = [(str(number), value) for number, value in enumerate(options)]
    else:
        return None
    for key, value in pairs:
        given = value if isinstance(value, str) and not value.startswith(("env:", "file:")) else ""
        if given and (_SECRET.search(_HUMP.sub("_", key)) or _PASSWORD_IN_URL.match(given)):
            return f"{above}{key}"
        if (found := _in_clear(value, f"{above}{key}.")) is not None:
            return found
    return None


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address as a connection uses it, is this machine and nothing else.

    Of names only `localhost` counts: any other, also one that begins like an address, may resolve to anything.
    """
    bare = host.strip().removeprefix("[").removesuffix("]").casefold()
    if bare == "localhost":
        return True
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def load_config(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> NodeConfig:
    """The configuration from `path` (None: defaults), `DICOM_NODE_<KEY>` variables for top-level keys, then overrides.

    Values of variables are read as YAML (`DICOM_NODE_DICOM_PORT=104`, `DICOM_NODE_AE_TITLES=[A, B]`); nested keys use
    two underscores (`DICOM_NODE_COMPLETION__QUIET_S=5`). Raises ConfigError.
    """
    settings = _read(path) if path is not None else {}
    for key, text in (os.environ if environ is None else environ).items():
        if key.startswith("DICOM_NODE_") and not key.startswith("DICOM_NODE_CORPUS"):
            _put(settings, key.removeprefix("DICOM_NODE_").lower().split("__"), _yaml(text, key), key)
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(settings, key.split("."), value, key)
    try:
        return NodeConfig.model_validate(settings)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, path)) from exc


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; name an existing file with --config") from exc
    settings = _yaml(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {type(settings).__name__}")
    return settings


def _yaml(text: str, where: str) -> Any:
    import yaml  # most processes are told their settings

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as exc:  # its own text quotes the line, and what stands there may be a secret
        mark = getattr(exc, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        problem = getattr(exc, "problem", None) or "no text that YAML knows"
        raise ConfigError(f"{where}: not readable as YAML: {problem}{place}") from None


def _put(settings: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for key in keys[:-1]:
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: {key} has no keys of its own")
        settings = inner
    settings[keys[-1]] = value


def _explain(exc: ValidationError, path: Path | None) -> str:
    lines = []
    for error in exc.errors():
        where = ".".join(str(part) for part in error["loc"]) or "configuration"
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown key; config/node.yaml shows every key there is"
        shown = f" (got {error['input']!r})" if _may_be_shown(error) else ""
        lines.append(f"{where}: {message}{shown}")
    return f"{path or 'settings'}: " + "; ".join(lines)


def _may_be_shown(error: ErrorDetails) -> bool:
    """Not what stands where nothing like it belongs, nor what may hold credentials: screens and logs show it."""
    key, value = error["loc"], error["input"]
    if isinstance(value, dict | NodeConfig) or error["type"] == "extra_forbidden":
        return False
    if key and str(key[-1]).endswith("_env"):  # the secret itself, where the name of its variable belongs
        return False
    return key[:1] != ("http_public_url",) and not (key[:1] == ("engines",) and key[2:] in ((), ("options",)))
