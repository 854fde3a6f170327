"""The receiver process: associations, services, intake. Part of the composition root."""

from __future__ import annotations

import socket
import threading

from dicom_node.audited import ReceivedStudies
from dicom_node.backpressure import disk_facts
from dicom_node.dimse.wires import server_class
from dicom_node.interfaces import Clock
from dicom_node.metrics import Metrics
from dicom_node.places import Places
from dicom_node.process import Facts, Orders, adopted
from dicom_node.pulse import receiver_role
from dicom_node.trails import node_trail
from dicom_node.wiring import CountedIngest, node_catalog, start_journal

__all__ = ["Receiver"]


class Receiver:
    """Associations, services, intake; other receivers may take connections from the same socket."""

    def __init__(self, orders: Orders, clock: Clock) -> None:
        config = orders.config
        self._catalog = node_catalog(config, clock, orders.epoch, migrated=orders.migrated)
        self._catalog.database.warm_up()
        self._catalog.database.keep_tidy()
        start_journal(self._catalog, config, orders.receiver_number)
        metrics = Metrics(config, process=receiver_role(orders.receiver_number))
        self._audit = node_trail(
            config, receiver_role(orders.receiver_number), clock, metrics, self._catalog.index.patient_ids
        )
        received = ReceivedStudies(self._audit) if config.audit is not None else None
        self._catalog.pressure.observer = metrics
        self._server = server_class(config.wire)(
            config,
            sink=CountedIngest(self._catalog, config, clock, metrics, received),
            index=self._catalog.index,
            associations=self._catalog.index,
            observe=metrics,
            commitments=self._catalog.queue,
            audit=self._audit,
            received=received,
            sock=adopted(orders),
            tls_sock=socket.socket(fileno=orders.tls_listen_fd) if orders.tls_listen_fd >= 0 else None,
            neighbours=(
                Places(orders.places_fd, orders.receiver_number, len(config.peers)) if orders.places_fd >= 0 else None
            ),
        )
        self._server.start()

    def health(self) -> Facts:
        """Whether connections are taken."""
        accepting = any(thread.name == "dicom-accept" for thread in threading.enumerate())
        facts = {
            "associations": self._server.active_associations,
            "certificate_ends": self._server.certificate_ends,
            **disk_facts(self._catalog.pressure),
        }
        return accepting, "" if accepting else "no connections are taken", facts

    def reload(self) -> None:
        """Nothing: TLS files that change are taken in by themselves."""

    def stop(self) -> None:
        """Requests under way may finish; the rest is aborted."""
        self._server.stop()
        self._audit.close()
        self._catalog.close()
