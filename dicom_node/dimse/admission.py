"""Who may associate (README "Peers"; PS3.8 9.3.4). Pure: titles and addresses in, a verdict out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dicom_node.config import NodeConfig
from dicom_node.dimse.policy import Policies, Policy
from dicom_node.dimse.rates import Moment, moments

__all__ = ["Admission", "Rejection"]

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason as in PS3.8 table 9-21; `reason` is the word for the counter."""

    result: int
    source: int
    diagnostic: int
    reason: str


WRONG_CALLED = Rejection(result=1, source=1, diagnostic=7, reason="called_ae")
WRONG_CALLING = Rejection(result=1, source=1, diagnostic=3, reason="calling_ae")
WRONG_ADDRESS = Rejection(result=1, source=1, diagnostic=3, reason="address")
WRONG_CERTIFICATE = Rejection(result=1, source=1, diagnostic=3, reason="certificate")
WRONG_APPLICATION_CONTEXT = Rejection(result=1, source=1, diagnostic=2, reason="protocol")
TOO_MANY = Rejection(result=2, source=3, diagnostic=2, reason="limit")  # local limit exceeded
TOO_OFTEN = Rejection(result=2, source=3, diagnostic=1, reason="rate")  # temporary congestion


class Admission:
    """The policy of one configuration. Raises ConfigError for peers that cannot be understood.

    `paid`: see `serving.Neighbours.paid`.
    """

    def __init__(self, config: NodeConfig, paid: Callable[[int], Sequence[Moment]] = lambda number: moments()) -> None:
        self._config = config
        self._policies = Policies(config, paid)

    def policy(self, calling: str, address: str) -> Policy:
        """What that peer may do; of one that is not admitted, what anybody may."""
        return self._policies.of(calling, address)[0] or Policy()

    def judge(
        self,
        *,
        calling: str,
        called: str,
        address: str,
        application_context: str,
        established: int,
        certificate: str = "",
        of_peer: Callable[[Policy], int] = lambda policy: 0,
    ) -> Rejection | None:
        """None when the association may be had; `established` is the number of those there are now.

        `certificate`: SHA-256 of the one the peer has shown and that was verified, '' for none. `of_peer` is asked,
        where it matters, for the number of those that this peer has.
        """
        if application_context != APPLICATION_CONTEXT:
            return WRONG_APPLICATION_CONTEXT
        if called not in self._config.ae_titles and not self._config.any_called_ae_title:
            return WRONG_CALLED
        if not calling or not (calling.isascii() and calling.isprintable()):  # PS3.5 table 6.2-1: AE
            return WRONG_CALLING
        policy, is_known = self._policies.of(calling, address)
        if policy is None:
            return WRONG_ADDRESS if is_known else WRONG_CALLING
        if policy.certificates and certificate not in policy.certificates:
            return WRONG_CERTIFICATE
        if established >= self._config.max_associations:
            return TOO_MANY
        if policy.max_associations is not None and of_peer(policy) >= policy.max_associations:
            return TOO_MANY
        rates = policy.rates
        if rates is not None and rates.associations is not None and not rates.associations.takes():
            return TOO_OFTEN
        return None
