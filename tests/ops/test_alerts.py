"""The alerts and the dashboard that ship: loaded by Prometheus's own tool, each alert raised once, every name real."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from dicom_node.metrics import GAUGES, PREFIX

CONFIG = Path(__file__).parents[2] / "config"
ALERTS = CONFIG / "prometheus" / "alerts.yaml"
DASHBOARD = CONFIG / "grafana" / "dicom-node.json"
RULES: Mapping[str, Mapping[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
}
WEEK = 7 * 24 * 60  # minutes
Tool = Callable[[str], str]

# alert: (series and their values minute by minute, minute to look, labels it must have, what it shows as its value)
# A series without a prefix is the node's; each has the label instance="n". Those of SLOW go by ten minutes.
SLOW = {"DicomNodeSourceSilent", "DicomNodeRuleSilent"}
Case = tuple[Mapping[str, str], int, Mapping[str, str], str]
RAISED: Mapping[str, Case] = {
    "DicomNodeDown": ({'up{job="dicom-node"}': "0x10"}, 5, {"job": "dicom-node"}, ""),
    "DicomNodeCatalogUnreadable": ({"catalog_readable": "0x10"}, 5, {}, ""),
    "DicomNodeProcessRestarts": ({'process_restarts{process="work"}': "0+1x20"}, 15, {"process": "work"}, ""),
    "DicomNodeLedgerImbalance": (
        {"ledger_imbalance_studies": "2x20", "ledger_imbalance_series": "0x20"}, 15, {}, "2",
    ),
    "DicomNodeDeadLetters": (
        {'dead_letters_total{kind="job",reason="error"}': "0x5 1x20"}, 10, {"kind": "job"}, "",
    ),
    "DicomNodeRefusesImages": ({"intake_state": "2x10"}, 5, {}, ""),
    "DicomNodeBackgroundPaused": ({"intake_state": "1x20"}, 15, {}, ""),
    "DicomNodeDiskFails": (
        {'storage_steps_total{step="sync",outcome="slow"}': "0+1x30"}, 20, {"outcome": "slow"}, "15",
    ),
    "DicomNodeDiskFillsSoon": (
        {'storage_free_bytes{volume="data"}': "1000000-1000x500", 'storage_reserve_bytes{volume="data"}': "50000x500"},
        420, {"volume": "data"}, "",
    ),
    "DicomNodeQuotaNotMet": (
        {'retention_over_quota_bytes{rule="delivered"}': "2048x150"}, 140, {"rule": "delivered"}, "2ki",
    ),
    "DicomNodeDeletionUnfinished": ({"deletions_unfinished": "2x60"}, 40, {}, "2"),
    "DicomNodeSourceSilent": (
        {'instances_received_total{calling_ae="CT1",modality="CT",outcome="new"}': f"0+10x{WEEK // 10 - 18} {WEEK}x60"},
        WEEK + 200, {"calling_ae": "CT1"}, "",
    ),
    "DicomNodeAssociationsRefused": (
        {'association_reject_total{reason="calling_ae"}': "0+1x60"}, 50, {"reason": "calling_ae"}, "",
    ),
    "DicomNodeWrongTokens": ({'http_refusals_total{reason="token"}': "0+1x60"}, 50, {}, ""),
    "DicomNodeContextsRefused": ({'context_refused_total{kind="role"}': "0+5x60"}, 50, {"kind": "role"}, ""),
    "DicomNodeStoresFail": (
        {'instances_received_total{calling_ae="CT1",modality="CT",outcome="failed"}': "0+1x30"}, 20, {}, "",
    ),
    "DicomNodeStudyNotRouted": ({"study_oldest_open_age_seconds": "0+60x80"}, 75, {}, ""),
    "DicomNodeJobsLate": ({'job_oldest_age_seconds{state="pending"}': "0+60x60"}, 50, {}, ""),
    "DicomNodeNothingFinishes": (
        {'jobs{state="pending"}': "3x60", 'job_attempts_total{engine="e",outcome="done"}': "7x60"}, 40, {}, "",
    ),
    "DicomNodeNoWorkers": ({"workers_alive": "0x20", 'jobs{state="pending"}': "1x20"}, 10, {}, ""),
    "DicomNodeUrgentTurnaround": (
        {
            'study_turnaround_seconds_bucket{priority="urgent",engine="e",le="300"}': "0x80",
            'study_turnaround_seconds_bucket{priority="urgent",engine="e",le="600"}': "0+1x80",
            'study_turnaround_seconds_bucket{priority="urgent",engine="e",le="+Inf"}': "0+1x80",
        },
        60, {}, "9m 45s",
    ),
    "DicomNodeEngineUnusable": ({'engine_usable{engine="e"}': "0x20"}, 10, {"engine": "e"}, ""),
    "DicomNodeDeviceFails": ({'runtime_breaker_state{device="cuda"}': "1x5"}, 2, {"device": "cuda"}, ""),
    "DicomNodeLeasesLost": ({"job_lease_expired_total": "0+1x30"}, 25, {}, ""),
    "DicomNodeEngineCredentialsEnd": (
        {'engine_token_expires_seconds{engine="e"}': "3600x60"}, 45, {"engine": "e"}, "",
    ),
    "DicomNodeDestinationDown": ({'destination_up{destination="PACS"}': "0x20"}, 10, {"destination": "PACS"}, ""),
    "DicomNodeDeliveriesLate": (
        {'delivery_oldest_age_seconds{destination="PACS",state="pending"}': "0+60x90"}, 80, {"destination": "PACS"}, "",
    ),
    "DicomNodeObjectsRefused": (
        {'deliveries_total{destination="PACS",object="SR",outcome="refused"}': "0x5 1x20"},
        10, {"destination": "PACS"}, "",
    ),
    "DicomNodeCertificateEnds": (
        {'tls_certificate_expiry_timestamp_seconds{certificate="tls"}': "177300x30"}, 15, {"certificate": "tls"},
        "2d 1h 0m 0s",
    ),
    "DicomNodeRulesBroken": ({"ruleset_load_failed": "1x20"}, 10, {}, ""),
    "DicomNodeRuleErrors": (
        {'rule_evaluations_total{rule="chest",verdict="error"}': "0x5 1x20"}, 10, {"rule": "chest"}, "",
    ),
    "DicomNodeRuleSilent": (
        {'rule_last_match_timestamp_seconds{rule="chest"}': f"60x{WEEK // 10 + 20}"}, WEEK + 10, {"rule": "chest"}, "",
    ),
    "DicomNodeIdentityConflicts": ({"identity_conflict_studies": "2x100"}, 90, {}, "2"),
    "DicomNodeAuditTrailChanged": ({"audit_trail_whole": "0x5"}, 2, {}, ""),
    "DicomNodeAuditNotWritten": ({'audit_sink_failures_total{sink="file"}': "0+1x30"}, 20, {}, ""),
    "DicomNodeAuditCollectorDown": ({'audit_collector_up{collector="arr"}': "0x30"}, 20, {"collector": "arr"}, ""),
    "DicomNodeAuditBacklog": (
        {'audit_backlog_messages{collector="arr"}': "20000x60"}, 45, {"collector": "arr"}, "20000",
    ),
}  # fmt: skip

# A busy node that is well: nothing of it may raise anything.
WELL: Mapping[str, str] = {
    'up{job="dicom-node"}': "1x600", "catalog_readable": "1x600", 'process_restarts{process="work"}': "1x600",
    "ledger_imbalance_studies": "0x600", "ledger_imbalance_series": "0x600",
    'retention_over_quota_bytes{rule="delivered"}': "2048x60 0x540", "deletions_unfinished": "1x10 0x590",
    'dead_letters_total{kind="job",reason="error"}': "3x600", "intake_state": "0x600",
    'storage_steps_total{step="sync",outcome="slow"}': "1x600",
    'storage_free_bytes{volume="data"}': "1000000-1x600", 'storage_reserve_bytes{volume="data"}': "50000x600",
    'instances_received_total{calling_ae="CT1",modality="CT",outcome="new"}': "0+100x600",
    'instances_received_total{calling_ae="CT1",modality="CT",outcome="failed"}': "1x600",
    'association_reject_total{reason="calling_ae"}': "5x600", 'context_refused_total{kind="role"}': "0+1x600",
    'http_refusals_total{reason="token"}': "3x600",
    "study_oldest_open_age_seconds": "20x600", 'job_oldest_age_seconds{state="pending"}': "200x600",
    'jobs{state="pending"}': "3x600", 'job_attempts_total{engine="e",outcome="done"}': "0+1x600",
    "workers_alive": "4x600", 'engine_usable{engine="e"}': "1x600", 'engine_breaker_state{engine="e"}': "0x600",
    'study_turnaround_seconds_bucket{priority="urgent",engine="e",le="30"}': "0+1x600",
    'study_turnaround_seconds_bucket{priority="urgent",engine="e",le="+Inf"}': "0+1x600",
    'runtime_breaker_state{device="cuda"}': "0x600", "job_lease_expired_total": "1x600",
    'runtime_restarts_total{device="cuda",reason="device"}': "2x600",
    'engine_token_expires_seconds{engine="e"}': "2000000x600", 'destination_up{destination="PACS"}': "1x600",
    'delivery_oldest_age_seconds{destination="PACS",state="pending"}': "30x600",
    'deliveries_total{destination="PACS",object="SR",outcome="refused"}': "1x600",
    'tls_certificate_expiry_timestamp_seconds{certificate="tls"}': "20000000x600", "ruleset_load_failed": "0x600",
    'rule_evaluations_total{rule="chest",verdict="error"}': "1x600",
    'rule_last_match_timestamp_seconds{rule="chest"}': "60+60x600", "identity_conflict_studies": "0x600",
    "audit_trail_whole": "1x600", 'audit_sink_failures_total{sink="file"}': "3x600",
    "audit_messages_lost_total": "9x600",
    'audit_collector_up{collector="arr"}': "1x600", 'audit_backlog_messages{collector="arr"}': "40x600",
}  # fmt: skip


def _series(values: Mapping[str, str]) -> list[dict[str, str]]:
    made = []
    for name, text in values.items():
        bare, _, labels = name.rstrip("}").partition("{")
        full = bare if bare == "up" else PREFIX + bare
        made.append({"series": f'{full}{{instance="n"{"," if labels else ""}{labels}}}', "values": text})
    return made


def _shown(text: str, labels: Mapping[str, str], value: str) -> str:
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], text)
    return re.sub(r"\{\{ \$value( \| \w+)? \}\}", value, text)


def _group(alert: str, case: Case) -> dict[str, Any]:
    series, minute, labels, value = case
    rule = RULES[alert]
    expected = {
        "exp_labels": {"instance": "n", **labels, **rule["labels"]},
        "exp_annotations": {key: _shown(text, labels, value) for key, text in rule["annotations"].items()},
    }
    look = {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": [expected]}
    step = "10m" if alert in SLOW else "1m"
    return {"name": alert, "interval": step, "input_series": _series(series), "alert_rule_test": [look]}


def _promtool(
    tool: Tool, tmp_path: Path, groups: Sequence[dict[str, Any]], step: str = "1m"
) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": step, "tests": list(groups)}))
    return subprocess.run(
        [tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_rules_and_the_scrape_configuration_load(tool: Tool) -> None:
    for words in (["rules", str(ALERTS)], ["config", str(CONFIG / "prometheus" / "prometheus.yaml")]):
        ran = subprocess.run(
            [tool("promtool"), "check", *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_is_raised_once(tool: Tool, tmp_path: Path) -> None:
    assert RAISED.keys() == RULES.keys()
    for step in ("1m", "10m"):
        groups = [_group(alert, case) for alert, case in RAISED.items() if (alert in SLOW) == (step == "10m")]
        ran = _promtool(tool, tmp_path, groups, step)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_node_that_is_well_raises_none(tool: Tool, tmp_path: Path) -> None:
    looks = [{"eval_time": f"{at}m", "alertname": alert, "exp_alerts": []} for alert in RULES for at in (60, 400)]
    group = {"interval": "1m", "input_series": _series(WELL), "alert_rule_test": looks}
    ran = _promtool(tool, tmp_path, [group])
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in ("page", "warning"), name
        assert set(rule["annotations"]) == {"summary", "action"}, name


# --- names -----------------------------------------------------------------------------------------------------------


def _expressions() -> Iterator[tuple[str, str]]:
    yield from ((name, str(rule["expr"])) for name, rule in RULES.items())
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))


def _used() -> Iterator[tuple[str, str, set[str]]]:
    """Where, the metric, and the labels its matchers name."""
    for where, expression in _expressions():
        for match in re.finditer(rf"({PREFIX}\w+)(?:\{{([^}}]*)\}})?", expression):
            yield where, match[1], set(re.findall(r"(\w+)\s*[=!]~?", match[2] or "")) - {"instance", "job"}


def test_every_metric_and_label_that_is_named_is_in_the_nodes_own_page(running_node: Callable[..., Any]) -> None:
    node = running_node(
        engines={},
        jobs={"workers": 0},
        peers={"ct": {"ae_title": "CT1"}},
        destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": 9}},
    )
    status, text = node.get("/metrics")
    assert status == 200
    known: dict[str, set[str]] = {PREFIX + name: set(labels) for name, (_, labels) in GAUGES.items()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    for name, (_, labels) in GAUGES.items():  # what is said of a gauge, and what it has
        assert known[PREFIX + name] == set(labels)
    # without engines, TLS or a rule these have nothing to say, and the declaration speaks for them
    quiet = {PREFIX + name for name in GAUGES}
    for where, metric, labels in _used():
        assert metric in known, f"{where}: {metric}"
        if metric not in quiet and not known[metric]:
            continue
        assert labels <= known[metric] | {"le"}, f"{where}: {metric}{labels - known[metric]}"


# --- the dashboard ---------------------------------------------------------------------------------------------------


def test_the_dashboard_can_be_loaded_and_its_expressions_are_right(tool: Tool, tmp_path: Path) -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "dicom-node" and board["id"] is None  # so that an import makes or replaces this one
    identities = [panel["id"] for panel in board["panels"]]
    assert len(set(identities)) == len(identities)
    assert {panel["title"] for panel in board["panels"] if panel["type"] == "row"} == {
        "Flow", "Queues", "Models", "Destinations", "Storage and intake", "DICOM",
    }  # fmt: skip
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$instance", "n")}
        for number, (_, expression) in enumerate(_expressions())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    ran = subprocess.run(
        [tool("promtool"), "check", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
