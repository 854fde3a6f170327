"""The state machine of the upper layer, as the Standard prints it (PS3.8 9.2, tables 9-1 to 9-10)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

__all__ = ["TRANSITIONS", "Action", "Event", "State"]


class State(Enum):
    """PS3.8 tables 9-1 to 9-5."""

    __hash__ = object.__hash__  # there is one of each

    STA1 = "idle"
    STA2 = "transport open, awaiting A-ASSOCIATE-RQ"
    STA3 = "awaiting the local A-ASSOCIATE response"
    STA4 = "awaiting the transport connection"
    STA5 = "awaiting A-ASSOCIATE-AC or -RJ"
    STA6 = "established"
    STA7 = "awaiting A-RELEASE-RP"
    STA8 = "awaiting the local A-RELEASE response"
    STA9 = "release collision, requestor: awaiting the local A-RELEASE response"
    STA10 = "release collision, acceptor: awaiting A-RELEASE-RP"
    STA11 = "release collision, requestor: awaiting A-RELEASE-RP"
    STA12 = "release collision, acceptor: awaiting the local A-RELEASE response"
    STA13 = "awaiting the close of the transport connection"


class Event(Enum):
    """PS3.8 9.2.2 by their numbers."""

    __hash__ = object.__hash__  # there is one of each

    ASSOCIATE_REQUEST = 1
    TRANSPORT_OPENED = 2
    ASSOCIATE_AC = 3
    ASSOCIATE_RJ = 4
    TRANSPORT_ACCEPTED = 5
    ASSOCIATE_RQ = 6
    ACCEPT_RESPONSE = 7
    REJECT_RESPONSE = 8
    P_DATA_REQUEST = 9
    P_DATA_TF = 10
    RELEASE_REQUEST = 11
    RELEASE_RQ = 12
    RELEASE_RP = 13
    RELEASE_RESPONSE = 14
    ABORT_REQUEST = 15
    ABORT = 16
    TRANSPORT_CLOSED = 17
    ARTIM_EXPIRED = 18
    INVALID_PDU = 19


class Action(Enum):
    """PS3.8 tables 9-6 to 9-9."""

    __hash__ = object.__hash__  # there is one of each

    AE_1 = "open the transport connection"
    AE_2 = "send A-ASSOCIATE-RQ"
    AE_3 = "tell that it was accepted"
    AE_4 = "tell that it was rejected, close"
    AE_5 = "start ARTIM"
    AE_6 = "stop ARTIM, tell of the request"
    AE_7 = "send A-ASSOCIATE-AC"
    AE_8 = "send A-ASSOCIATE-RJ, start ARTIM"
    DT_1 = "send P-DATA-TF"
    DT_2 = "tell of the data"
    AR_1 = "send A-RELEASE-RQ"
    AR_2 = "tell of the release request"
    AR_3 = "tell that it was released, close"
    AR_4 = "send A-RELEASE-RP, start ARTIM"
    AR_5 = "stop ARTIM"
    AR_6 = "tell of the data that came after the release request"
    AR_7 = "send P-DATA-TF after the peer's release request"
    AR_8 = "release collision: tell of the release request"
    AR_9 = "release collision, requestor: send A-RELEASE-RP"
    AR_10 = "release collision, acceptor: tell that it was released"
    AA_1 = "send A-ABORT as service user, start ARTIM"
    AA_2 = "stop ARTIM, close"
    AA_3 = "tell of the abort, close"
    AA_4 = "tell that the connection was lost"
    AA_5 = "stop ARTIM: the connection closed before anything came"
    AA_6 = "pass over the PDU"
    AA_7 = "send A-ABORT again"
    AA_8 = "send A-ABORT as upper layer, tell of it, start ARTIM"


_ABORTED_BY_US = (Event.ASSOCIATE_AC, Event.ASSOCIATE_RJ, Event.P_DATA_TF, Event.RELEASE_RQ, Event.RELEASE_RP)
_OPEN = tuple(state for state in State if state not in (State.STA1, State.STA2, State.STA4, State.STA13))


def _table() -> dict[tuple[Event, State], Action]:
    # what any PDU or failure means wherever the table has nothing better
    table: dict[tuple[Event, State], Action] = {}
    for event in (*_ABORTED_BY_US, Event.ASSOCIATE_RQ, Event.INVALID_PDU):
        table |= {(event, state): Action.AA_8 for state in _OPEN}
        table[event, State.STA2] = Action.AA_1
        table[event, State.STA13] = Action.AA_6 if event in _ABORTED_BY_US else Action.AA_7
    table |= {(Event.ABORT, state): Action.AA_3 for state in _OPEN}
    table |= {(Event.TRANSPORT_CLOSED, state): Action.AA_4 for state in (*_OPEN, State.STA4)}
    table |= {(Event.ABORT_REQUEST, state): Action.AA_1 for state in _OPEN}
    for state in (State.STA2, State.STA13):
        table[Event.ABORT, state] = Action.AA_2
        table[Event.ARTIM_EXPIRED, state] = Action.AA_2
    table[Event.ABORT_REQUEST, State.STA4] = Action.AA_2
    table[Event.TRANSPORT_CLOSED, State.STA2] = Action.AA_5
    table[Event.TRANSPORT_CLOSED, State.STA13] = Action.AR_5
    # association establishment
    table[Event.ASSOCIATE_REQUEST, State.STA1] = Action.AE_1
    table[Event.TRANSPORT_OPENED, State.STA4] = Action.AE_2
    table[Event.ASSOCIATE_AC, State.STA5] = Action.AE_3
    table[Event.ASSOCIATE_RJ, State.STA5] = Action.AE_4
    table[Event.TRANSPORT_ACCEPTED, State.STA1] = Action.AE_5
    table[Event.ASSOCIATE_RQ, State.STA2] = Action.AE_6
    table[Event.ACCEPT_RESPONSE, State.STA3] = Action.AE_7
    table[Event.REJECT_RESPONSE, State.STA3] = Action.AE_8
    # data
    table[Event.P_DATA_REQUEST, State.STA6] = Action.DT_1
    table[Event.P_DATA_TF, State.STA6] = Action.DT_2
    table[Event.P_DATA_TF, State.STA7] = Action.AR_6
    table[Event.P_DATA_REQUEST, State.STA8] = Action.AR_7
    # release
    table[Event.RELEASE_REQUEST, State.STA6] = Action.AR_1
    table[Event.RELEASE_RQ, State.STA6] = Action.AR_2
    table[Event.RELEASE_RQ, State.STA7] = Action.AR_8
    table[Event.RELEASE_RP, State.STA7] = Action.AR_3
    table[Event.RELEASE_RP, State.STA10] = Action.AR_10
    table[Event.RELEASE_RP, State.STA11] = Action.AR_3
    table[Event.RELEASE_RESPONSE, State.STA8] = Action.AR_4
    table[Event.RELEASE_RESPONSE, State.STA9] = Action.AR_9
    table[Event.RELEASE_RESPONSE, State.STA12] = Action.AR_4
    return table


TRANSITIONS: Mapping[tuple[Event, State], Action] = _table()
"""PS3.8 table 9-10. A pair that is not here cannot happen, or is a fault of whoever drives the machine."""
