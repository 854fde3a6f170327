"""The parts of the configuration: what one peer, one destination, one disk can be told. `config` puts them together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dicom_node.model import CommitmentTimes, ConflictPolicy, UserCredentials

__all__ = [
    "AeTitle",
    "AuditSettings",
    "CollectorSettings",
    "CommitmentSettings",
    "CompletionOverride",
    "CompletionSettings",
    "DeliverySettings",
    "DestinationSettings",
    "EngineSettings",
    "FindSettings",
    "JobSettings",
    "Name",
    "PeerSettings",
    "Port",
    "RateSettings",
    "Seconds",
    "Service",
    "Settings",
    "StorageSettings",
    "TimeZone",
    "TlsClientSettings",
    "TlsSettings",
    "UserSettings",
]


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
TimeZone = Annotated[str, AfterValidator(_zone)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class _KeySettings(Settings):
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


Service = Literal["echo", "store", "find", "get", "move", "commitment"]


class RateSettings(Settings):
    """How much one peer may ask of all receivers together; null = as much as it likes."""

    objects_per_s: Annotated[float, Field(gt=0)] | None = None
    """C-STORE requests. What is beyond is read later: the sender waits, and nothing is refused."""
    bytes_per_s: Annotated[float, Field(ge=65536)] | None = None
    """Of data sets that it stores; as above."""
    queries_per_minute: Annotated[float, Field(gt=0)] | None = None
    """C-FIND, C-GET and C-MOVE; what is beyond is answered "out of resources"."""
    associations_per_minute: Annotated[float, Field(gt=0)] | None = None
    """What is beyond is rejected for the moment (RJ 2,3,1)."""

    @property
    def is_set(self) -> bool:
        """Whether there is any bound."""
        return self != RateSettings()


class PeerSettings(Settings):
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
    report_tls: bool | TlsClientSettings = False
    """true: it is told over TLS, as of a destination."""
    services: tuple[Service, ...] | None = None
    """What it may ask for; null = all, storage commitment only where `storage_commitment` says so."""
    sop_classes: tuple[str, ...] = ()
    """SOP classes it may store, by UID or keyword (CTImageStorage); empty = all that the node takes."""
    move_destinations: tuple[Name, ...] | None = None
    """Destinations that its C-MOVE may name; null = all."""
    max_associations: Annotated[int, Field(ge=1)] | None = None
    """At the same time, in all receivers together; more are rejected for the moment (RJ 2,3,2)."""
    rate: RateSettings = RateSettings()
    user_identity: Literal["off", "optional", "required"] | None = None
    """Whether its associations must say which user they are for; null = as `user_identity.mode` says."""
    users: tuple[str, ...] = ()
    """The users it may come for; empty = any that the node knows."""

    @model_validator(mode="before")
    @classmethod
    def _commits_as_service(cls, given: Any) -> Any:
        """`commitment` among the services is another way to say `storage_commitment: true`."""
        if isinstance(given, Mapping) and isinstance(given.get("services"), list | tuple):
            named = "commitment" in given["services"]
            if named and given.get("storage_commitment") is None:
                return {**given, "storage_commitment": True}
            if bool(given.get("storage_commitment")) is not named:
                raise ValueError(
                    "services, storage_commitment: one says that it may ask for storage commitment and the other that "
                    "it may not; list `commitment` under services and set storage_commitment: true, or neither"
                )
        return given

    @model_validator(mode="after")
    def _can_be_told(self) -> PeerSettings:
        if self.storage_commitment and not (self.report_host and self.report_port):
            raise ValueError(
                "storage_commitment: its reports need an address; set report_host and report_port to where "
                f"{self.ae_title!r} takes associations"
            )
        return self


class CommitmentSettings(Settings):
    """How a destination is asked for storage commitment."""

    timeout_s: Seconds = 3600.0
    """A destination that has not reported after this is asked again; then after twice that, and so on."""
    wait_s: Annotated[float, Field(ge=0, le=60)] = 2.0
    """How long its report is waited for on the association of the question; it may also come later on its own."""


class UserSettings(Settings):
    """As which user the node comes to a destination (PS3.7 D.3.3.7). Secrets lie in variables or files, not here."""

    name: Annotated[str, Field(max_length=256)] = ""
    passcode_env: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = ""
    passcode_file: Path | None = None
    """With neither, only the name is told."""
    jwt_file: Path | None = None
    """A JSON Web Token instead of name and passcode; read for each association, so that it can be renewed."""
    allow_plain: bool = False
    """Tell secrets to another machine without TLS too: whoever is on the way reads them."""

    @model_validator(mode="after")
    def _one_identity(self) -> UserSettings:
        if bool(self.name) == (self.jwt_file is not None):
            raise ValueError("name, jwt_file: one of the two says who the user is; set exactly one")
        passcodes = (bool(self.passcode_env), self.passcode_file is not None)
        if all(passcodes) or (any(passcodes) and self.jwt_file is not None):
            raise ValueError("passcode_env, passcode_file, jwt_file: more than one secret is named; keep one")
        if self.passcode_env.startswith("DICOM_NODE_"):
            raise ValueError("passcode_env: variables that begin with DICOM_NODE_ are settings; use another name")
        return self

    def credentials(self) -> UserCredentials:
        """What a destination carries of it."""
        return UserCredentials(
            name=self.name,
            passcode_env=self.passcode_env,
            passcode_file=str(self.passcode_file or ""),
            jwt_file=str(self.jwt_file or ""),
            allow_plain=self.allow_plain,
        )


class DestinationSettings(Settings):
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
    user: UserSettings | None = None
    """As which user the node comes; null = as none."""
    before_deletion: Literal["auto", "find", "accepted"] = "auto"
    """What retention wants to know before it deletes what was sent here, where the destination did not commit to it:
    find: a C-FIND finds every object there; accepted: nothing more; auto: find, where it takes queries at all."""

    def commitment(self) -> CommitmentTimes | None:
        """How it is asked, None when it is not."""
        settings = self.storage_commitment
        if settings is True:
            settings = CommitmentSettings()
        return CommitmentTimes(wait_s=settings.wait_s, timeout_s=settings.timeout_s) if settings else None


class EngineSettings(Settings):
    """Something that analyses a series. `kind` local: a model package; other kinds come from plug-ins."""

    kind: Name = "local"
    model: str = ""
    """Of a local engine: an embedded or installed package's id, with or without @VERSION, or a package folder. Of an
    engine elsewhere that offers several: the name of one."""
    timeout_s: Seconds = 600.0
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Whatever the kind needs. A secret only as `env:NAME` or `file:/path`, also where the kind is a plug-in's."""


class CompletionOverride(Settings):
    """Other completion times for a calling AE title and / or modality; the first that fits is used."""

    calling_ae_title: AeTitle | None = None
    modality: str | None = None
    quiet_s: Annotated[float, Field(ge=0)] | None = None
    quiet_after_fault_s: Annotated[float, Field(ge=0)] | None = None
    forced_after_s: Seconds | None = None


class CompletionSettings(Settings):
    """When a study is taken as complete (README, "When does a study run")."""

    quiet_s: Annotated[float, Field(ge=0)] = 10.0
    quiet_after_fault_s: Annotated[float, Field(ge=0)] = 300.0
    idle_association_s: Seconds = 60.0
    forced_after_s: Seconds = 1800.0
    immediate_modalities: tuple[str, ...] = ("CR", "DX", "MG")
    overrides: tuple[CompletionOverride, ...] = ()
    tick_s: Seconds = 0.5


class FindSettings(Settings):
    """C-FIND behaviour."""

    strict: bool = False
    """Refuse relational queries that were not negotiated (0xA900) instead of answering them."""
    unsupported_optional_keys: Literal["FF01", "empty"] = "FF01"
    """FF01 as PS3.4 C.2.2.1.3 says, or silently empty values (FF00) for old clients."""


class StorageSettings(Settings):
    """Disk."""

    reserve_bytes: Annotated[int, Field(ge=0)] = 2 * 1024**3
    reserve_ratio: Annotated[float, Field(ge=0, le=0.9)] = 0.02
    """Free space kept: the larger of the two; below it C-STORE is answered 0xA700. Set both 0 to switch it off."""
    pause_at: Annotated[float, Field(ge=1)] = 1.5
    """Below so many times the reserve no routine or background job is begun; urgent ones are."""
    catalog_reserve_bytes: Annotated[int, Field(ge=0)] = 512 * 1024**2
    """Of the reserve (at most half of it) the last, for catalog and journal alone: below it results wait too. Where the
    catalog is on another volume than the archive, the reserve there."""
    slow_step_s: Annotated[float, Field(ge=0)] = 2.0
    """A sync or commit that takes longer pauses background work for half a minute. 0: none does."""
    journal_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    """Of the intake journal of each receiver, which makes objects durable before their files are. An object larger than
    1 MiB is synced by itself; 0: every one is."""
    max_object_bytes: Annotated[int, Field(gt=0)] = 8 * 1024**3
    """A larger one is read to its end and answered 0xA700; one that goes on beyond twice as much is aborted."""
    max_inflated_header_bytes: Annotated[int, Field(gt=0)] = 16 * 1024**2
    """Bound on what is inflated of a Deflated data set to read its header."""
    quarantine_bytes: Annotated[int, Field(ge=0)] = 4 * 1024**3
    """Of files that engines returned and that do not fit, kept for a person to look at; the oldest go. 0: keep none."""
    quarantine_files: Annotated[int, Field(ge=0, le=10_000)] = 200


class JobSettings(Settings):
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


class DeliverySettings(Settings):
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


class CollectorSettings(Settings):
    """An audit record repository: every message goes there too (PS3.15 A.6, A.7)."""

    host: str
    protocol: Literal["tls", "udp"] = "tls"
    """`tls`: RFC 5425. `udp`: RFC 5426, neither encrypted nor sure to arrive."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 = 6514 for TLS, 514 for UDP."""
    tls: TlsClientSettings = TlsClientSettings()

    def effective_port(self) -> int:
        """The port that is meant."""
        return self.port or (6514 if self.protocol == "tls" else 514)


class AuditSettings(Settings):
    """The audit trail (PS3.15 A.5, IHE ATNA): a file that cannot be changed unseen, and collectors."""

    folder: Path | None = None
    """null = `audit` in the data folder."""
    source_id: str = ""
    """AuditSourceID; '' = the first AE title."""
    site_id: str = ""
    """AuditEnterpriseSiteID; '' = none."""
    file_bytes: Annotated[int, Field(ge=64 * 1024)] = 64 * 1024**2
    """A new file is begun when one has this size; none is ever removed."""
    max_message_bytes: Annotated[int, Field(ge=4096, le=60_000)] = 32768
    """What a longer message leaves out is told in it; collectors must take as much (PS3.15 A.6: 32768)."""
    collectors: Mapping[Name, CollectorSettings] = Field(default_factory=dict)
