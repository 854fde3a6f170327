"""The status screen says what is wrong first, and what to do about it."""

from dataclasses import replace
from typing import Any

from dicom_node.pulse import Pulse
from dicom_node.screen import NodeFacts, render_status
from dicom_node.store.pressure import Grade, Pressed
from dicom_node.store.queue import Stuck

SNAPSHOT: dict[str, Any] = {
    "studies": {"total": 12, "open": 1, "oldest_open_age_s": 300.0, "identity_conflicts": 1},
    "instances": 340,
    "ledger": {"reasons": {"no rule matched": 3}},
    "ledger_studies": {"received": 12, "routed": 7, "filtered": 3, "waiting": 1, "failed": 1, "imbalance": 0},
    "jobs": {"pending": {"count": 2, "oldest_age_s": 90.0}, "done": {"count": 5, "oldest_age_s": 0.0}},
    "deliveries": {"PACS": {"failed": {"count": 1, "oldest_age_s": 7200.0}}},
    "variants": {"variant": 2},
    "returned": {"taken": 3, "untaken": 1},
    "commitments": {"asked": 1, "judged": 2, "reported": 0, "failed": 0},
    "associations": {"open": 1, "by_calling_ae": {"CT1": 1}},
}


def pulse(ok: bool = True, **facts: Any) -> Pulse:
    return Pulse(pid=1, boot_id="b", boot_s=1.0, started_at="2026-01-02T03:04:05", ok=ok, facts=facts)


def stuck(kind: str, number: int | None, next_s: float | None, age_s: float = 10.0) -> Stuck:
    return Stuck(
        kind=kind,
        id=number,
        study_instance_uid="1.2.3",
        name="a name",
        state="failed" if next_s is None else "pending",
        why="a reason\nof two lines",
        age_s=age_s,
        next_s=next_s,
    )


def screen(found: list[Stuck] | None = None, **changes: Any) -> str:
    facts: dict[str, Any] = {
        "name": "NODE",
        "data_dir": "data",
        "pulses": {
            "supervisor": pulse(dicom_port=11112, http_port=8080, restarts={"work": 2}),
            "receiver": pulse(),
            "service": pulse(rules=3, rules_error=""),
            "work": pulse(),
        },
        "alive": frozenset({"receiver", "service", "work"}),
        "free_bytes": 5 * 1024**3,
        "pressed": Pressed(Grade.OPEN),
        "snapshot": SNAPSHOT,
        "stuck": found or [],
        **changes,
    }
    return render_status(NodeFacts(**facts))


def test_a_healthy_node_on_one_screen() -> None:
    text = screen()
    assert "running since 2026-01-02T03:04:05Z, DICOM port 11112, HTTP port 8080" in text
    assert "receiver ok, service ok, work ok (2 restarts)" in text
    assert "12 received = 7 routed + 3 filtered + 1 waiting + 1 failed" in text
    assert "3 series: no rule matched" in text
    assert "2 pending (oldest 90 s), 5 done" in text
    assert "1 failed (oldest 2 h)" in text
    assert "5 GiB above the reserve" in text
    assert len(text.splitlines()) <= 24


def test_ports_of_their_own_are_shown() -> None:
    ports = {"dicom_port": 104, "tls_port": 2762, "http_port": 8080, "metrics_port": 9100}
    text = screen(pulses={"supervisor": pulse(**ports)})
    assert "DICOM port 104, over TLS 2762, HTTP port 8080, /ready and /metrics on 9100" in text
    assert "over TLS" not in screen() and "/ready" not in screen()


def test_an_engine_that_cannot_run_and_a_device_that_fails_are_said() -> None:
    runtimes = [{"device": "cuda:0", "breaker": 1, "models": []}, {"device": "cpu", "breaker": 0, "models": []}]
    text = screen(
        pulses={"supervisor": pulse(), "work": pulse(unusable={"chest": "it is\ndisabled"}, runtimes=runtimes)}
    )
    assert "engine      chest CANNOT RUN, its jobs wait: it is disabled" in text
    assert "device      cuda:0 FAILED AGAIN AND AGAIN, the CPU does its work" in text and "device      cpu" not in text


def test_a_silent_process_broken_rules_and_a_full_disk_are_said() -> None:
    text = screen(
        alive=frozenset({"service"}),
        pressed=Pressed(Grade.REFUSING, "free space is below the reserve"),
        pulses={"supervisor": pulse(), "service": pulse(rules=3, rules_error="x.yaml:1: wrong")},
    )
    assert "receiver SILENT" in text
    assert "the rules on disk are broken" in text
    assert "C-STORE IS REFUSED; urgent jobs and results go on: free space is below the reserve" in text
    assert "jobs WAIT: the disk is slow" in screen(pressed=Pressed(Grade.PAUSED, "the disk is slow"))
    assert "no job is done" in screen(pressed=Pressed(Grade.FULL, "the reserve is used up"))


def test_a_node_that_does_not_run_says_so() -> None:
    assert "NODE: not running" in screen(alive=frozenset())


def test_an_imbalance_is_shouted() -> None:
    ledger = {**SNAPSHOT["ledger_studies"], "imbalance": 2}
    assert "UNACCOUNTED FOR: 2" in screen(snapshot={**SNAPSHOT, "ledger_studies": ledger})


def test_what_needs_a_person_comes_first_with_the_command_that_helps() -> None:
    lines = screen(
        [
            stuck("job", 4, 30.0),
            stuck("delivery", 5, None),
            stuck("job", 6, None),
            stuck("conflict", None, None),
            stuck("series", None, None),
        ]
    ).splitlines()
    remedies = [line.split("; ")[1] for line in lines if line.startswith("    study 1.2.3; ")]
    assert sorted(remedies[:4]) == [
        "needs a person: dicom-node deliveries retry 5",
        "needs a person: dicom-node jobs retry 6",
        "needs a person: dicom-node release 1.2.3",
        "needs a person: dicom-node route 1.2.3",
    ]
    assert remedies[4] == "goes on by itself in 30 s"


def test_a_long_reason_is_told_to_its_end() -> None:
    why = "engine relu: PUT storage.example: " + "a reason that goes on " * 8 + "and ends with the remedy"
    text = screen([replace(stuck("job", 6, None), why=why)])
    assert "ends with the remedy" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_what_peers_ask_to_be_committed_to_is_counted() -> None:
    assert "associations open: 1; peers' requests for storage commitment: 1 asked, 2 judged" in screen()


def test_a_thousand_stuck_things_still_fit_a_screen() -> None:
    text = screen([stuck("job", number, None) for number in range(1000)])
    assert "and 988 more" in text
    assert "a reason of two lines" in text
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
