"""When a study revision is complete enough to be routed (DESIGN section 5). Pure: the time is an argument.

A study is complete when no C-STORE for it is in progress and it has been quiet: for `quiet_s` if every association
that fed it was released or has been idle for `idle_association_s`, for `quiet_after_fault_s` if one ended by abort,
died with its process, or had a failed C-STORE (scanners try again). It is forced after `forced_after_s`.
Single-image radiograph series do not wait at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from dicom_node.config import CompletionOverride, CompletionSettings
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    CloseTrigger,
    FeedingAssociation,
    StudyActivity,
)

__all__ = ["Due", "due"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """Whether to close a study revision now.

    `trigger` is None while it is not due. `series` are the pending series to route now. `at_s` is the second of the
    current boot at which the study becomes due if nothing else arrives, None when it is due now or has nothing to
    route. `waiting_for` is a sentence for `dicom-node status`.
    """

    trigger: CloseTrigger | None
    series: tuple[str, ...]
    at_s: float | None
    waiting_for: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    quiet_s: float
    quiet_after_fault_s: float
    forced_after_s: float


def due(activity: StudyActivity, settings: CompletionSettings, now: BootTime) -> Due:
    """Whether the pending series of `activity` are to be routed at `now`, and what they wait for if not.

    Of a moment of another boot only this is sure: at least the whole uptime has passed since. Counting that, and not
    "long past", gives a sender whose transmission a restart cut in two the usual time to come back.
    """
    if not activity.pending_series:
        return Due(trigger=None, series=(), at_s=None, waiting_for="nothing: every series was routed")
    times = _times(activity, settings)
    quiet_left, quiet_reason = _quiet_left(activity, settings, times, now)
    forced_left = _forced_left(activity, times, now)
    if quiet_left <= 0:
        return _now(CloseTrigger.IDLE, activity.pending_series, "nothing: no instance is on its way")
    if forced_left <= 0:
        return _now(CloseTrigger.FORCED, activity.pending_series, f"nothing: open for {times.forced_after_s:g} s")
    if single := _immediate(activity, settings):
        return _now(CloseTrigger.IMMEDIATE, single, "nothing: single-image radiographs do not wait")
    left = min(quiet_left, forced_left)
    if forced_left <= quiet_left:
        sentence = f"{quiet_reason}; routed as it is in {forced_left:.0f} s"
    else:
        sentence = f"{quiet_reason}; due in {quiet_left:.0f} s"
    return Due(trigger=None, series=(), at_s=now.seconds + left, waiting_for=sentence)


def _now(trigger: CloseTrigger, series: tuple[str, ...], sentence: str) -> Due:
    return Due(trigger=trigger, series=series, at_s=None, waiting_for=sentence)


def _immediate(activity: StudyActivity, settings: CompletionSettings) -> tuple[str, ...]:
    if activity.modalities.isdisjoint(settings.immediate_modalities):
        return ()
    return tuple(uid for uid in activity.pending_series if uid in activity.immediate_series)


def _quiet_left(
    activity: StudyActivity, settings: CompletionSettings, times: _Times, now: BootTime
) -> tuple[float, str]:
    """Seconds until the study counts as quiet (<= 0: it does), and what holds it open."""
    fault = next((reason for a in activity.associations if (reason := _fault(a))), "")
    quiet_s = times.quiet_after_fault_s if fault else times.quiet_s
    left = quiet_s - _elapsed(activity.last_received, now)
    reason = f"{quiet_s:g} s without a new instance" + (f", because {fault}" if fault else "")
    for association in activity.associations:
        if association.end is AssociationEnd.OPEN:
            idle_left = settings.idle_association_s - _elapsed(association.last_activity, now)
            if idle_left > max(left, 0):
                left = idle_left
                reason = (
                    f"the association of {association.calling_ae_title} to be released "
                    f"or idle for {settings.idle_association_s:g} s"
                )
    return left, reason


def _fault(association: FeedingAssociation) -> str:
    """Why the sender may try again, or ''."""
    who = association.calling_ae_title
    if association.store_failed:
        return f"a C-STORE of {who} failed"
    if association.end is AssociationEnd.ABORTED:
        return f"an association of {who} was aborted"
    if association.end is AssociationEnd.DEAD:
        return f"an association of {who} died with its process"
    return ""


def _forced_left(activity: StudyActivity, times: _Times, now: BootTime) -> float:
    return times.forced_after_s - _elapsed(activity.first_received, now)


def _elapsed(then: BootTime, now: BootTime) -> float:
    """Seconds that have passed for sure; the boot clock starts at 0, so of another boot it is the uptime."""
    return now.seconds - then.seconds if then.boot_id == now.boot_id else now.seconds


def _times(activity: StudyActivity, settings: CompletionSettings) -> _Times:
    """The settings, with the values of the first override that fits."""
    override = next((o for o in settings.overrides if _fits(o, activity)), CompletionOverride())
    return _Times(
        quiet_s=_first(override.quiet_s, settings.quiet_s),
        quiet_after_fault_s=_first(override.quiet_after_fault_s, settings.quiet_after_fault_s),
        forced_after_s=_first(override.forced_after_s, settings.forced_after_s),
    )


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _fits(override: CompletionOverride, activity: StudyActivity) -> bool:
    title = override.calling_ae_title
    if title is not None and all(a.calling_ae_title != title for a in activity.associations):
        return False
    return override.modality is None or override.modality in activity.modalities
