"""Settings: `config/node.yaml`, then `DICOM_NODE_*` variables, then flags; checked, frozen, every key with a default.

An unknown key, a wrong type or a name that leads nowhere is a ConfigError that says the key, the value and what is
expected. This file knows no part of the node.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dicom_node.errors import ConfigError
from dicom_node.model import CommitmentTimes, ConflictPolicy, Destination, TlsClient

__all__ = [
    "CommitmentSettings",
    "CompletionOverride",
    "CompletionSettings",
    "DeliverySettings",
    "DestinationSettings",
    "EngineSettings",
    "FindSettings",
    "JobSettings",
    "NodeConfig",
    "PeerSettings",
    "StorageSettings",
    "TlsClientSettings",
    "TlsSettings",
    "is_loopback",
    "load_config",
    "packaged",
]


def packaged(*parts: str) -> Path:
    """A file or folder that ships inside the package (default rules, demonstration weights)."""
    return Path(__file__).parent.joinpath(*parts)


def _ae_title(value: str) -> str:
    # PS3.5 table 6.2-1, AE: 1-16 characters of the default repertoire, no backslash, no control characters
    if not re.fullmatch(r"[\x20-\x5b\x5d-\x7e]{1,16}", value) or not value.strip():
        raise ValueError(f"{value!r} is no AE title: 1-16 printable ASCII characters without a backslash")
    return value.strip()


def _zone(value: str) -> str:
    # PS3.3 C.12.1.1.8: (0008,0201) is &ZZXX, -1200 .. +1400
    match = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", value)
    hours = timedelta(hours=int(match[2]), minutes=int(match[3])) if match else timedelta(days=1)
    if match is None or hours > timedelta(hours=14):
        raise ValueError(f"{value!r} is no UTC offset: write e.g. '+0100'")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        raise ValueError(f"{value!r} is no name: letters, digits, '_', '-', '.', at most 64")
    return value


def _fingerprint(value: str) -> str:
    bare = value.replace(":", "").replace(" ", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", bare):
        raise ValueError(f"{value!r} is no SHA-256 fingerprint: 64 hexadecimal digits, with or without colons")
    return bare


AeTitle = Annotated[str, AfterValidator(_ae_title)]
Fingerprint = Annotated[str, AfterValidator(_fingerprint)]
Name = Annotated[str, AfterValidator(_name)]
Port = Annotated[int, Field(ge=0, le=65535)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|hip)(:[0-9]{1,3})?)$")]
Seconds = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class _KeySettings(_Settings):
    """A private key in a file. Its passphrase, if it has one, is in an environment variable or in a file."""

    key_passphrase_env: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = ""
    key_passphrase_file: Path | None = None

    @model_validator(mode="after")
    def _one_passphrase(self) -> _KeySettings:
        if self.key_passphrase_env and self.key_passphrase_file:
            raise ValueError("key_passphrase_env and key_passphrase_file are both set; keep one")
        if self.key_passphrase_env.startswith("DICOM_NODE_"):
            raise ValueError("key_passphrase_env: variables that begin with DICOM_NODE_ are settings; use another name")
        return self


Profile = Literal["bcp195", "bcp195-non-downgrading", "bcp195-extended"]


class TlsSettings(_KeySettings):
    """DICOM over TLS, for those who call the node (PS3.15 B.9 to B.13). Files are PEM and taken in when they change."""

    certificate: Path
    """With the intermediate authorities after it."""
    key: Path
    ca: Path | None = None
    """Authorities whose certificates clients, and AEs the node calls, must have."""
    profile: Profile = "bcp195"
    """Nothing below TLS 1.2 is spoken in any. `bcp195-extended`: no cipher suite of TLS 1.2 below 256 bits."""
    client_auth: Literal["required", "none"] = "required"
    port: Port | None = None
    """null: `dicom_port` speaks TLS and nothing else; a port: TLS there, beside plain DICOM on `dicom_port`."""

    @model_validator(mode="after")
    def _knows_clients(self) -> TlsSettings:
        if self.client_auth == "required" and self.ca is None:
            raise ValueError(
                "ca: clients must show a certificate (client_auth: required) and no authority is named; "
                "set ca to the PEM file of yours, or client_auth: none"
            )
        return self


class TlsClientSettings(_KeySettings):
    """How an AE is called over TLS. What is null is taken from the node's own `tls`."""

    ca: Path | None = None
    """Authorities its certificate must have; null and no `tls.ca`: those the system trusts."""
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    """The name or address in its certificate; null = its host."""

    @model_validator(mode="after")
    def _whole_pair(self) -> TlsClientSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; set both or neither")
        return self


class PeerSettings(_Settings):
    """An AE that may talk to the node. Once one peer is configured, only peers may (RJ 1,1,3)."""

    ae_title: AeTitle
    hosts: tuple[str, ...] = ()
    """Addresses or networks (CIDR) it may come from; empty = any."""
    idle_timeout_s: Seconds | None = None
    """Overrides `association_idle_timeout_s`: consoles hold associations for hours."""
    is_engine: bool = False
    """What it sends are results: they match no rule unless the rule says `origin: any`."""
    conflict_policy: ConflictPolicy | None = None
    certificates: tuple[Fingerprint, ...] = ()
    """SHA-256 fingerprints of its certificates: it must come over TLS with one of them; empty = any, or none."""
    storage_commitment: bool = False
    """It may ask the node to commit to keeping objects (Storage Commitment Push Model)."""
    report_host: str = ""
    report_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where it is told what was committed to, when its own association is over. Needed with `storage_commitment`."""

    @model_validator(mode="after")
    def _can_be_told(self) -> PeerSettings:
        if self.storage_commitment and not (self.report_host and self.report_port):
            raise ValueError(
                "storage_commitment: its reports need an address; set report_host and report_port to where "
                f"{self.ae_title!r} takes associations"
            )
        return self


class CommitmentSettings(_Settings):
    """How a destination is asked for storage commitment."""

    timeout_s: Seconds = 3600.0
    """A destination that has not reported after this is asked again; then after twice that, and so on."""
    wait_s: Annotated[float, Field(ge=0, le=60)] = 2.0
    """How long its report is waited for on the association of the question; it may also come later on its own."""


class DestinationSettings(_Settings):
    """An AE that results or images are sent to, and that C-MOVE may name."""

    ae_title: AeTitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    calling_ae_title: AeTitle | None = None
    results: tuple[Literal["seg", "sr", "stl", "sc", "pdf", "ann"], ...] | None = None
    """Only these kinds of result are sent here (`seg`: label maps too); null = all a rule asks for."""
    tls: bool | TlsClientSettings = False
    """true: over TLS, with the certificate and the authorities of the node's own `tls`."""
    storage_commitment: bool | CommitmentSettings = False
    """Deliveries are done only when it committed to keeping what was sent; `true` or the times of the asking."""

    def commitment(self) -> CommitmentTimes | None:
        """How it is asked, None when it is not."""
        settings = self.storage_commitment
        if settings is True:
            settings = CommitmentSettings()
        return CommitmentTimes(wait_s=settings.wait_s, timeout_s=settings.timeout_s) if settings else None


class EngineSettings(_Settings):
    """Something that analyses a series. `kind` local: a model package; other kinds come from plug-ins."""

    kind: Name = "local"
    model: str = ""
    """Of a local engine: an embedded or installed package's id, with or without @VERSION, or a package folder. Of an
    engine elsewhere that offers several: the name of one."""
    timeout_s: Seconds = 600.0
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Whatever the kind needs."""


class CompletionOverride(_Settings):
    """Other completion times for a calling AE title and / or modality; the first that fits is used."""

    calling_ae_title: AeTitle | None = None
    modality: str | None = None
    quiet_s: Annotated[float, Field(ge=0)] | None = None
    quiet_after_fault_s: Annotated[float, Field(ge=0)] | None = None
    forced_after_s: Seconds | None = None


class CompletionSettings(_Settings):
    """When a study is taken as complete (README, "When does a study run")."""

    quiet_s: Annotated[float, Field(ge=0)] = 10.0
    quiet_after_fault_s: Annotated[float, Field(ge=0)] = 300.0
    idle_association_s: Seconds = 60.0
    forced_after_s: Seconds = 1800.0
    immediate_modalities: tuple[str, ...] = ("CR", "DX", "MG")
    overrides: tuple[CompletionOverride, ...] = ()
    tick_s: Seconds = 0.5


class FindSettings(_Settings):
    """C-FIND behaviour."""

    strict: bool = False
    """Refuse relational queries that were not negotiated (0xA900) instead of answering them."""
    unsupported_optional_keys: Literal["FF01", "empty"] = "FF01"
    """FF01 as PS3.4 C.2.2.1.3 says, or silently empty values (FF00) for old clients."""


class StorageSettings(_Settings):
    """Disk."""

    reserve_bytes: Annotated[int, Field(ge=0)] = 2 * 1024**3
    reserve_ratio: Annotated[float, Field(ge=0, le=0.9)] = 0.02
    """Free space kept: the larger of the two; below it C-STORE is answered 0xA700. Set both 0 to switch it off."""
    journal_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    """Of the intake journal of each receiver, which makes objects durable before their files are. An object larger than
    an eighth of it is synced by itself; 0: every one is."""
    max_object_bytes: Annotated[int, Field(gt=0)] = 8 * 1024**3
    max_inflated_header_bytes: Annotated[int, Field(gt=0)] = 16 * 1024**2
    """Bound on what is inflated of a Deflated data set to read its header."""
    quarantine_bytes: Annotated[int, Field(ge=0)] = 4 * 1024**3
    """Of files that engines returned and that do not fit, kept for a person to look at; the oldest go. 0: keep none."""
    quarantine_files: Annotated[int, Field(ge=0, le=10_000)] = 200


class JobSettings(_Settings):
    """Analysis work."""

    workers: Annotated[int, Field(ge=0, le=64)] = 3
    """Jobs at a time: one is read, one is on the device, one is encoded. Urgent jobs have one more for themselves."""
    lease_s: Seconds = 30.0
    max_attempts: Annotated[int, Field(ge=1)] = 10
    """Of attempts that may have failed by the job's own fault; where the node's storage, the engine or its package was
    not to be had, it is none."""
    backoff_s: Seconds = 5.0
    backoff_max_s: Seconds = 600.0
    deadline_s: Seconds = 24 * 3600.0
    """A job that was tried and is not done this long after it was created becomes a dead letter."""
    devices: tuple[Device, ...] = ("auto",)
    """`auto`, `cpu`, `cuda`, `cuda:1` ...: one runtime process for each."""
    memory_mb: Annotated[int, Field(ge=0)] = 0
    """Memory of one device for loaded networks; the least recently used go. 0: four fifths of a GPU, half the RAM."""
    prepared_mb: Annotated[int, Field(ge=1)] = 2048
    """Memory for volumes that are read and not yet finished, of all engines together; others wait, urgent ones have as
    much again."""
    decoders: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that decode compressed pixel data, started when first needed. 0: one for each core, at most 4."""
    hang_s: Annotated[float, Field(ge=5)] = 120.0
    """A runtime process that works and is silent for so long is killed; it speaks between batches of windows, and gets
    more where a batch was found to be slow."""
    trusted_code: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 of the Python files that model packages of trust `code` may run; with none, no such package runs."""


class DeliverySettings(_Settings):
    """Sending results and images."""

    lease_s: Seconds = 30.0
    give_up_after_s: Seconds = 7 * 24 * 3600.0
    """A delivery that was tried and is not done this long after it was queued becomes a dead letter."""
    backoff_s: Seconds = 5.0
    backoff_max_s: Seconds = 3600.0
    breaker_failures: Annotated[int, Field(ge=1)] = 3
    """After this many failed tries in a row the destination is only probed, one delivery at a time."""
    breaker_probe_s: Seconds = 30.0
    connect_timeout_s: Seconds = 10.0
    response_timeout_s: Seconds = 60.0


class NodeConfig(_Settings):
    """Everything the node can be told."""

    ae_titles: Annotated[tuple[AeTitle, ...], Field(min_length=1)] = ("DICOM_NODE",)
    any_called_ae_title: bool = False
    host: str = "127.0.0.1"
    dicom_port: Port = 11112
    http_host: str = "127.0.0.1"
    http_port: Port = 8080
    http_public_url: Annotated[str, Field(pattern=r"^(https?://[^\s/?#@]+(/[^\s?#]*)?)?$")] = ""
    """How engines elsewhere reach the HTTP port, through whatever stands before it: for those that fetch images from
    here or tell that they are through. '' = none does, and the port answers nothing to them."""
    data_dir: Path = Path("data")
    rules_dir: Path | None = None
    """null = `routing_rules/` in the current folder if it exists, else the rules that ship with the package."""
    time_zone: Annotated[str, AfterValidator(_zone)] = "+0000"
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
        titles = [peer.ae_title for peer in self.peers.values()]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"peers: AE title {twice[0]!r} is given to two peers; make one entry with both hosts")
        return self

    @model_validator(mode="after")
    def _tls_where_it_can_be(self) -> NodeConfig:
        asks = [f"destinations.{name}.tls" for name, one in self.destinations.items() if one.tls is not False]
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
        )

    def committed_to(self) -> Mapping[str, Destination]:
        """The peers that may ask for storage commitment, by AE title: where each takes its reports."""
        return {
            peer.ae_title: Destination(name=name, ae_title=peer.ae_title, host=peer.report_host, port=peer.report_port)
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
    return key[:1] != ("http_public_url",) and not (key[:1] == ("engines",) and key[2:] in ((), ("options",)))
