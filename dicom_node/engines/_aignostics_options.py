"""What an engine of kind `aignostics` can be told."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, model_validator

from dicom_node.engines._http import HttpSettings
from dicom_node.engines.labels import LabelTable
from dicom_node.engines.oauth import OAuthSettings
from dicom_node.engines.secrets import Secret

__all__ = ["Fact", "PlatformOptions"]

Fact = Literal["width", "height", "mpp", "media_type", "checksum", "stain"]
Hours = Annotated[float, Field(gt=0, le=30 * 24)]


def _public_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fit = False
    if value and (not fit or "@" in parts.netloc or parts.query or parts.fragment or not value.isascii()):
        raise ValueError("expected https://host[:port][/path], as the platform reaches this node")
    return value.rstrip("/")


class PlatformOptions(HttpSettings):
    """`options` of an engine of kind `aignostics`; those of `HttpSettings` stand beside them."""

    max_response_bytes: Annotated[int, Field(gt=0)] = 32 * 1024**2
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$")]
    """Of the application, always this one: without it results of two days could not be compared."""
    auth: OAuthSettings | None = None
    """Where access tokens are to be had; for an account of a person with `refresh_token` and `client_id`."""
    token: Secret | None = None
    """An access token somebody else renews, instead of `auth`."""
    send_identifiable: bool = False
    """Let the platform see who the patient is."""
    public_url: Annotated[str, AfterValidator(_public_url)] = ""
    """How the platform reaches this node's HTTP port, to fetch slides under signed URLs; '' = as the node is told."""
    link_days: Annotated[float, Field(ge=6.0, le=7.9)] = 7.0
    """How long the URL of a slide lives; the platform asks for six days at least."""
    send: Literal["auto", "dicom", "zip"] = "auto"
    """The base level as one DICOM file, or the pyramid as one zip. auto: one file where there is one level."""
    max_slide_bytes: Annotated[int, Field(gt=0)] = 20 * 1024**3
    input_artifact: Annotated[str, Field(max_length=256)] = ""
    """Which of the version's inputs the slide is; '' where it has one."""
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    """What only people know of all slides that get here, by the names of the version's schema, such as `specimen`."""
    keys: dict[str, Fact] = Field(default_factory=dict)
    """Which fact of the slide a name of the schema stands for, where it cannot be told from the name."""
    checksum: Literal["base64", "hex"] = "base64"
    """How the CRC32C of the file is written."""
    outputs: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of the names of output artifacts that are fetched, such as `*geojson*`."""
    labels: LabelTable = LabelTable()
    """What its classes are, by name."""
    due_hours: Hours | None = None
    """When the results are wanted, from the submission on: the platform tries."""
    deadline_hours: Hours | None = None
    """When the platform cancels what is not done, from the submission on."""
    poll_s: Annotated[float, Field(gt=0)] = 30.0
    poll_max_s: Annotated[float, Field(gt=0)] = 300.0
    """A run is asked after more and more seldom as it grows older."""
    look_up_s: Annotated[float, Field(gt=0)] = 60.0
    """After an answer was lost: how long to wait before the platform's runs are searched for ours."""
    look_ups: Annotated[int, Field(ge=1, le=20)] = 3
    """How often they are searched without finding it until it is submitted again."""
    delete_after_fetch: bool = False
    """Have the platform delete a run's outputs once they lie here; else it does so 30 days after the run."""
    tell_fetched: bool = False
    """Write `node_state: fetched` into the run's custom metadata, for others who look at the platform."""
    notice: Annotated[str, Field(max_length=200)] = ""
    """Goes into every result, e.g. "research use only"."""

    @model_validator(mode="after")
    def _one_credential(self) -> PlatformOptions:
        if (self.auth is None) == (self.token is None):
            raise ValueError("give one of auth (token_url, client_id, refresh_token) and token")
        if self.due_hours is not None and self.deadline_hours is not None and self.due_hours > self.deadline_hours:
            raise ValueError("due_hours comes after deadline_hours")
        return self
