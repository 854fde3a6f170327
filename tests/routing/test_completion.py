"""When a study is complete: every sentence of the definition, on a clock that the test moves."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.config import CompletionOverride, CompletionSettings
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    CloseTrigger,
    FeedingAssociation,
    StudyActivity,
)
from dicom_node.routing.completion import due

SETTINGS = CompletionSettings()


def at(seconds: float, boot: str = "boot-1") -> BootTime:
    return BootTime(boot_id=boot, seconds=seconds)


def fed_by(
    end: AssociationEnd = AssociationEnd.RELEASED,
    *,
    last: BootTime | None = None,
    title: str = "CT1",
    failed: bool = False,
) -> FeedingAssociation:
    return FeedingAssociation(
        association_id=title, calling_ae_title=title, end=end, last_activity=last or at(1000), store_failed=failed
    )


def study(*associations: FeedingAssociation, **changes: Any) -> StudyActivity:
    activity = StudyActivity(
        study_instance_uid="1.2.3",
        revision=1,
        first_received=at(1000),
        last_received=at(1000),
        associations=associations or (fed_by(),),
        modalities=frozenset({"CT"}),
        pending_series=("1.2.3.1", "1.2.3.2"),
        instance_count=10,
    )
    return replace(activity, **changes)


def test_a_study_is_complete_ten_seconds_after_its_last_instance_when_every_association_was_released() -> None:
    waiting = due(study(), SETTINGS, at(1009.9))
    assert (waiting.trigger, waiting.series) == (None, ())
    assert waiting.at_s == pytest.approx(1010)
    assert waiting.waiting_for == "10 s without a new instance; due in 0 s"
    done = due(study(), SETTINGS, at(1010))
    assert (done.trigger, done.series, done.at_s) == (CloseTrigger.IDLE, ("1.2.3.1", "1.2.3.2"), None)


def test_an_open_association_holds_the_study_until_it_has_been_idle_for_a_minute() -> None:
    busy = study(fed_by(AssociationEnd.OPEN, last=at(1030)))
    waiting = due(busy, SETTINGS, at(1089))
    assert waiting.trigger is None
    assert waiting.at_s == pytest.approx(1090)
    assert waiting.waiting_for == "the association of CT1 to be released or idle for 60 s; due in 1 s"
    assert due(busy, SETTINGS, at(1090)).trigger is CloseTrigger.IDLE


def test_one_open_association_among_released_ones_holds_the_study() -> None:
    busy = study(fed_by(title="CT1"), fed_by(AssociationEnd.OPEN, title="MR1", last=at(1100)))
    assert due(busy, SETTINGS, at(1100)).waiting_for.startswith("the association of MR1")


@pytest.mark.parametrize(
    ("association", "why"),
    [
        (fed_by(AssociationEnd.ABORTED), "an association of CT1 was aborted"),
        (fed_by(AssociationEnd.DEAD), "an association of CT1 died with its process"),
        (fed_by(AssociationEnd.RELEASED, failed=True), "a C-STORE of CT1 failed"),
    ],
)
def test_after_a_fault_the_study_waits_five_minutes(association: FeedingAssociation, why: str) -> None:
    activity = study(fed_by(title="OTHER"), association)
    waiting = due(activity, SETTINGS, at(1299))
    assert waiting.trigger is None
    assert waiting.at_s == pytest.approx(1300)
    assert waiting.waiting_for == f"300 s without a new instance, because {why}; due in 1 s"
    assert due(activity, SETTINGS, at(1300)).trigger is CloseTrigger.IDLE


def test_an_open_association_that_is_still_busy_after_half_an_hour_is_forced() -> None:
    activity = study(fed_by(AssociationEnd.OPEN, last=at(2790)), last_received=at(2790))
    waiting = due(activity, SETTINGS, at(2795))
    assert waiting.at_s == pytest.approx(2800)
    assert waiting.waiting_for.endswith("routed as it is in 5 s")
    forced = due(activity, SETTINGS, at(2800))
    assert (forced.trigger, forced.series) == (CloseTrigger.FORCED, activity.pending_series)


def test_a_single_image_radiograph_series_does_not_wait() -> None:
    activity = study(
        fed_by(AssociationEnd.OPEN),
        modalities=frozenset({"DX"}),
        pending_series=("1.2.3.1",),
        immediate_series=("1.2.3.1",),
    )
    now = due(activity, SETTINGS, at(1000))
    assert (now.trigger, now.series) == (CloseTrigger.IMMEDIATE, ("1.2.3.1",))


def test_only_the_single_image_series_are_routed_at_once_and_the_others_wait() -> None:
    activity = study(modalities=frozenset({"DX", "CT"}), immediate_series=("1.2.3.2",))
    now = due(activity, SETTINGS, at(1000))
    assert (now.trigger, now.series) == (CloseTrigger.IMMEDIATE, ("1.2.3.2",))
    rest = replace(activity, pending_series=("1.2.3.1",), immediate_series=())
    assert due(rest, SETTINGS, at(1000)).trigger is None


def test_without_immediate_modalities_radiographs_wait_too() -> None:
    activity = study(modalities=frozenset({"DX"}), immediate_series=("1.2.3.1",))
    assert due(activity, CompletionSettings(immediate_modalities=()), at(1000)).trigger is None


def test_a_study_with_nothing_pending_is_never_due() -> None:
    nothing = due(study(pending_series=()), SETTINGS, at(99999))
    assert (nothing.trigger, nothing.series, nothing.at_s) == (None, (), None)
    assert nothing.waiting_for == "nothing: every series was routed"


def test_after_a_restart_of_the_machine_the_uptime_is_what_has_passed_for_sure() -> None:
    before = at(50000, "boot-0")
    activity = study(fed_by(AssociationEnd.DEAD, last=before), first_received=before, last_received=before)
    assert due(activity, SETTINGS, at(40)).trigger is None, "the sender gets its usual time to come back"
    assert due(activity, SETTINGS, at(301)).trigger is CloseTrigger.IDLE


def test_an_open_association_of_another_boot_holds_nothing() -> None:
    activity = study(fed_by(AssociationEnd.OPEN, last=at(50000, "boot-0")))
    assert due(activity, SETTINGS, at(1010)).trigger is CloseTrigger.IDLE


def test_a_restart_in_the_middle_of_a_transmission_does_not_force_the_study() -> None:
    activity = study(fed_by(AssociationEnd.OPEN, last=at(90)), first_received=at(50000, "boot-0"), last_received=at(90))
    assert due(activity, SETTINGS, at(95)).trigger is None
    busy = replace(activity, last_received=at(1799), associations=(fed_by(AssociationEnd.OPEN, last=at(1799)),))
    assert due(busy, SETTINGS, at(1800)).trigger is CloseTrigger.FORCED


def test_the_first_override_that_fits_gives_the_times() -> None:
    settings = CompletionSettings(
        overrides=(
            CompletionOverride(calling_ae_title="MR1", modality="MR", quiet_s=60.0),
            CompletionOverride(calling_ae_title="MR1", quiet_s=30.0),
            CompletionOverride(modality="MR", quiet_s=20.0, forced_after_s=90.0),
        )
    )
    mr = frozenset({"MR"})
    assert due(study(fed_by(title="MR1"), modalities=mr), settings, at(1000)).at_s == pytest.approx(1060)
    assert due(study(fed_by(title="MR1")), settings, at(1000)).at_s == pytest.approx(1030)
    assert due(study(fed_by(title="MR2"), modalities=mr), settings, at(1000)).at_s == pytest.approx(1020)
    assert due(study(fed_by(title="CT1")), settings, at(1000)).at_s == pytest.approx(1010)


def test_an_override_changes_only_what_it_names() -> None:
    settings = CompletionSettings(overrides=(CompletionOverride(modality="CT", quiet_after_fault_s=0.0),))
    assert due(study(), settings, at(1000)).at_s == pytest.approx(1010)
    assert due(study(fed_by(AssociationEnd.ABORTED)), settings, at(1000)).trigger is CloseTrigger.IDLE
    forced = CompletionSettings(overrides=(CompletionOverride(modality="CT", forced_after_s=5.0),))
    assert due(study(fed_by(AssociationEnd.OPEN)), forced, at(1005)).trigger is CloseTrigger.FORCED


times = st.floats(min_value=0, max_value=10_000, allow_nan=False)
boots = st.sampled_from(["boot-0", "boot-1"])
moments = st.builds(at, times, boots)


@given(
    first=moments,
    last=moments,
    now=times,
    ends=st.lists(st.tuples(st.sampled_from(AssociationEnd), moments, st.booleans()), max_size=3),
)
def test_what_is_not_due_becomes_due_exactly_when_it_says(
    first: BootTime, last: BootTime, now: float, ends: list[tuple[AssociationEnd, BootTime, bool]]
) -> None:
    associations = tuple(fed_by(end, last=moment, failed=failed) for end, moment, failed in ends)
    activity = study(first_received=first, last_received=last)
    activity = replace(activity, associations=associations)
    verdict = due(activity, SETTINGS, at(now))
    if verdict.trigger is None:
        assert verdict.at_s is not None
        assert verdict.waiting_for
        assert due(activity, SETTINGS, at(verdict.at_s + 0.001)).trigger is not None
        halfway = (now + verdict.at_s) / 2
        assert due(activity, SETTINGS, at(min(halfway, verdict.at_s - 0.001))).trigger is None
    else:
        assert verdict.series == activity.pending_series
