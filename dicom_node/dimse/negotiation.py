"""An A-ASSOCIATE-RQ and what the node answers to it. Pure: PDUs and policy in, PDUs and agreement out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dicom_node.dimse.contexts import (
    ACCEPTED,
    FIND_SOP_CLASSES,
    GET_SOP_CLASSES,
    MOVE_SOP_CLASSES,
    TRANSFER_SYNTAXES_NOT_SUPPORTED,
    USER_REJECTION,
    Acceptance,
    Answer,
    Proposal,
    answer_contexts,
)
from dicom_node.dimse.link import AgreedContext
from dicom_node.dimse.upper_layer import pdus
from dicom_node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.services.find import FindOptions

__all__ = ["Agreement", "answer_request", "extended_answer", "refusal_kind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What is answered, and what holds from then on."""

    answer: pdus.AssociateAC
    contexts: Mapping[int, AgreedContext]
    refused: Sequence[Answer]
    find_options: Mapping[str, FindOptions]


def answer_request(
    request: pdus.AssociateRQ, acceptance: Acceptance, *, max_pdu_bytes: int, identity_response: bytes | None = None
) -> Agreement | None:
    """The answer to a request that is admitted; None for one whose context ids nobody could tell apart.

    `identity_response`: what whoever asked for it is told of the user that was verified (PS3.7 D.3.3.7.2).
    """
    proposals = _proposals(request)
    if not proposals or len({item.context_id for item in proposals}) != len(proposals):
        return None
    answers = answer_contexts(proposals, acceptance)
    roles = {item.proposal.abstract_syntax: item.role_reply for item in answers if item.role_reply is not None}
    extended, options = [], {}
    for item in request.user.extended:
        answered = extended_answer(item.sop_class_uid, item.application_information)
        if answered is not None:
            reply, options[item.sop_class_uid] = answered
            extended.append(pdus.ExtendedNegotiation(sop_class_uid=item.sop_class_uid, application_information=reply))
    answer = pdus.AssociateAC(
        called_ae_title=request.called_ae_title[:16],
        calling_ae_title=request.calling_ae_title[:16],
        contexts=tuple(
            pdus.AnsweredContext(
                context_id=item.proposal.context_id, result=item.result, transfer_syntax=item.transfer_syntax
            )
            for item in answers
        ),
        user=pdus.UserInformation(
            maximum_length=max_pdu_bytes,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            roles=tuple(pdus.RoleSelection(sop_class_uid=uid, scu=scu, scp=scp) for uid, (scu, scp) in roles.items()),
            extended=tuple(extended),
            identity_response=identity_response,
        ),
    )
    return Agreement(
        answer=answer,
        contexts={item.proposal.context_id: _agreed(item) for item in answers if item.result == ACCEPTED},
        refused=[item for item in answers if item.result != ACCEPTED],
        find_options=options,
    )


def extended_answer(sop_class_uid: str, asked: bytes) -> tuple[bytes, FindOptions] | None:
    """The answer to SOP class extended negotiation of queries and retrievals: what is asked for and there.

    PS3.4 C.5.1.1.1 (find: relational, combined date-time, fuzzy names, time zone ...) and C.5.2.1.1, C.5.3.1.1
    (relational retrieval ...). Fuzzy semantic matching and time zone adjustment are not there.
    """
    if sop_class_uid not in FIND_SOP_CLASSES | MOVE_SOP_CLASSES | GET_SOP_CLASSES or not asked:
        return None
    relational = asked[0] == 1
    combined = sop_class_uid in FIND_SOP_CLASSES and len(asked) > 1 and asked[1] == 1
    reply = bytearray(len(asked))
    reply[0] = relational
    if combined:
        reply[1] = 1
    return bytes(reply), FindOptions(relational=relational, datetime=combined)


def refusal_kind(answer: Answer) -> str:
    """The counter's word for a context that was refused."""
    if answer.denied:
        return "policy"
    kinds = {TRANSFER_SYNTAXES_NOT_SUPPORTED: "transfer_syntax", USER_REJECTION: "role"}
    return kinds.get(answer.result, "abstract_syntax")


def _proposals(request: pdus.AssociateRQ) -> list[Proposal]:
    roles = {role.sop_class_uid: role for role in request.user.roles}
    found = []
    for context in request.contexts:
        role = roles.get(context.abstract_syntax)
        found.append(
            Proposal(
                context_id=context.context_id,
                abstract_syntax=context.abstract_syntax,
                transfer_syntaxes=context.transfer_syntaxes,
                scu=role.scu if role is not None else None,
                scp=role.scp if role is not None else None,
            )
        )
    return found


def _agreed(answer: Answer) -> AgreedContext:
    return AgreedContext(
        context_id=answer.proposal.context_id,
        abstract_syntax=answer.proposal.abstract_syntax,
        transfer_syntax=answer.transfer_syntax,
        we_ask=answer.requestor_scp,
        peer_asks=answer.requestor_scu,
    )
