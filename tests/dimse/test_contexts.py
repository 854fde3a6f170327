"""What the node agrees to: SOP classes, transfer syntaxes in order of preference, roles."""

import random

import pytest

from dicom_node.dimse.contexts import (
    STORAGE_SOP_CLASSES,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    TRANSFER_SYNTAXES,
    VERIFICATION,
    Acceptance,
    Proposal,
    answer_contexts,
    choose_transfer_syntax,
)

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED, RLE, J2K_LOSSLESS, BASELINE, J2K = (
    f"1.2.840.10008.1.2.{suffix}" for suffix in ("1.99", "5", "4.90", "4.50", "4.91")
)
CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.mark.parametrize(
    "suffix", ["1", "2", "4", "7", "30", "66.4", "66.7", "66.8", "88.34", "104.3", "104.4", "91.1", "481.3", "128.1"]
)
def test_the_storage_classes_of_the_current_standard_are_known(suffix: str) -> None:
    assert f"1.2.840.10008.5.1.4.1.1.{suffix}" in STORAGE_SOP_CLASSES


@pytest.mark.parametrize(
    "uid", ["1.2.840.10008.1.3.10", "1.2.840.10008.1.20.1", VERIFICATION, STUDY_ROOT_FIND, "1.2.840.10008.4.2"]
)
def test_what_is_no_storage_class_is_not_among_them(uid: str) -> None:
    assert uid not in STORAGE_SOP_CLASSES


def test_every_transfer_syntax_of_the_standard_is_taken() -> None:
    for suffix in ("", ".1", ".1.99", ".2", ".4.50", ".4.70", ".4.90", ".4.110", ".4.203", ".4.205", ".5", ".8.1"):
        assert f"1.2.840.10008.1.2{suffix}" in TRANSFER_SYNTAXES
    assert "1.2.840.113619.5.2" not in TRANSFER_SYNTAXES


def test_the_choice_follows_the_kind_of_syntax_not_the_order_of_the_offer() -> None:
    preferred = [EXPLICIT, IMPLICIT, BIG, J2K_LOSSLESS, BASELINE]
    shuffler = random.Random(4)
    while preferred:
        offered = preferred.copy()
        shuffler.shuffle(offered)
        assert choose_transfer_syntax(offered) == preferred.pop(0)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([DEFLATED, BIG], DEFLATED),
        ([BIG, DEFLATED], BIG),
        ([RLE, J2K_LOSSLESS], RLE),
        ([J2K, J2K_LOSSLESS], J2K_LOSSLESS),
        ([J2K, BASELINE], J2K),
        (["1.2.3.4"], None),
        (["1.2.3.4", BASELINE], BASELINE),
        ([], None),
    ],
)
def test_within_a_kind_the_requestor_decides(offered: list[str], chosen: str | None) -> None:
    assert choose_transfer_syntax(offered) == chosen


def one(acceptance: Acceptance | None = None, **fields: object) -> tuple[int, str, tuple[bool, bool] | None]:
    """Result, transfer syntax and role reply for one proposal."""
    defaults = {"context_id": 1, "abstract_syntax": CT, "transfer_syntaxes": (IMPLICIT, EXPLICIT)}
    (answer,) = answer_contexts([Proposal(**{**defaults, **fields})], acceptance or Acceptance())  # type: ignore[arg-type]
    return answer.result, answer.transfer_syntax, answer.role_reply


def test_private_classes_are_taken_only_by_configuration() -> None:
    private = "1.3.6.1.4.1.9999.1"
    assert one(abstract_syntax=private)[0] == 3
    assert one(Acceptance(extra_sop_classes={private}), abstract_syntax=private)[:2] == (0, EXPLICIT)
    unknown = Acceptance(unknown_sop_classes=True)
    assert one(unknown, abstract_syntax=private)[0] == 0
    assert one(unknown, abstract_syntax="1.2.840.10008.1.20.1")[0] == 3  # storage commitment: known, and no storage


def test_a_context_without_a_known_syntax_is_refused_for_that() -> None:
    assert one(transfer_syntaxes=("1.2.3",))[:2] == (4, "1.2.3")


def test_queries_come_in_native_syntaxes_only() -> None:
    assert one(abstract_syntax=STUDY_ROOT_FIND, transfer_syntaxes=(DEFLATED,))[0] == 4
    assert one(abstract_syntax=STUDY_ROOT_FIND, transfer_syntaxes=(DEFLATED, BIG))[:2] == (0, BIG)


@pytest.mark.parametrize(
    ("abstract", "scu", "scp", "result", "reply"),
    [
        (CT, None, None, 0, None),
        (CT, True, False, 0, (True, False)),
        (CT, False, True, 0, (False, True)),
        (CT, True, True, 0, (True, True)),
        (CT, False, False, 1, (False, False)),
        (STUDY_ROOT_GET, True, True, 0, (True, False)),
        (STUDY_ROOT_GET, False, True, 1, (False, False)),
    ],
)
def test_a_role_is_granted_where_the_node_can_play_the_other(
    abstract: str, scu: bool | None, scp: bool | None, result: int, reply: tuple[bool, bool] | None
) -> None:
    found = one(abstract_syntax=abstract, scu=scu, scp=scp)
    assert (found[0], found[2]) == (result, reply)


@pytest.mark.parametrize(
    ("commits", "is_told", "roles", "result", "reply"),
    [
        (True, False, (None, None), 0, None),
        (True, False, (True, True), 0, (True, False)),
        (True, False, (False, True), 1, (False, False)),
        (False, True, (False, True), 0, (False, True)),  # a destination that reports (PS3.4 J.3.3.1.3)
        (False, True, (None, None), 0, None),
        (True, True, (True, True), 0, (True, True)),
        (False, False, (None, None), 3, None),
    ],
)
def test_storage_commitment_is_for_those_it_is_enabled_for(
    commits: bool,
    is_told: bool,
    roles: tuple[bool | None, bool | None],
    result: int,
    reply: tuple[bool, bool] | None,
) -> None:
    acceptance = Acceptance(commits=commits, is_told=is_told)
    found = one(acceptance, abstract_syntax="1.2.840.10008.1.20.1", scu=roles[0], scp=roles[1])
    assert (found[0], found[2]) == (result, reply)


def test_every_proposal_gets_one_answer_in_order() -> None:
    proposals = [
        Proposal(context_id=number, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,)) for number in (255, 3, 1)
    ]
    assert [answer.proposal.context_id for answer in answer_contexts(proposals, Acceptance())] == [1, 3, 255]
