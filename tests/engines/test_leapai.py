"""LeapAI CXR over real sockets, against a server that was written from the vendor's pages."""

import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.demo.packages import _FINDING_CODES
from dicom_node.demo.phantom_cxr import FINDING_NAMES
from dicom_node.engines import _leapai_answers as answers
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
)
from dicom_node.model import (
    Level,
    Origin,
    SeriesView,
    Source,
    StoredInstance,
)
from dicom_node.pipeline.encode import encoded, result_context
from dicom_node.results.codes import FINDINGS
from dicom_node.results.sr import SrEncoder
from dicom_node.routing.load import load_rules
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.values import (
    Findings,
    Presence,
)

ROOT = Path(__file__).resolve().parents[2]
CALLED, NAME = "/share/in", "DOE^JOHN THE SECRET"


def _load() -> ModuleType:
    name = "leapai_test_bench"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "leapai_bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kit = _load()
bench, leap, stored, only, by_key = kit.bench, kit.leap, kit.stored, kit.only, kit.by_key


# --- findings --------------------------------------------------------------------------------------------------------


def test_the_findings_have_the_keys_names_and_codes_of_the_local_model() -> None:
    table = {key: (name, [code.scheme, code.value, code.meaning]) for key, (name, code) in answers.CONDITIONS.items()}
    assert table == {key: (name, _FINDING_CODES[key]) for key, name in FINDING_NAMES.items()}
    assert list(table) == list(FINDING_NAMES)
    assert {key: code for key, (_, code) in answers.CONDITIONS.items()} == {k: r.code for k, r in FINDINGS.items()}


def test_every_condition_is_reported_with_presence_confidence_and_threshold(bench: Any) -> None:
    image = bench.image()
    result = bench.run(image)
    findings = only(result)
    assert findings.sop_instance_uid == image.sop_instance_uid
    assert [(item.name, item.confidence) for item in findings.items] == list(leap.SCORES.items())
    present = [item.key for item in findings.items if item.presence is Presence.PRESENT]
    assert present == ["cardiomegaly", "pleural_effusion", "consolidation", "infiltration"]
    assert {item.threshold for item in findings.items} == {0.5}
    assert "the engine's word for the image: Abnormal" in findings.notes
    assert (result.provenance.version, result.provenance.manufacturer) == ("1.4.2", "LeapAI")


def test_a_configured_threshold_decides_instead_of_the_engines_word(bench: Any) -> None:
    found = by_key(bench.run(thresholds={"cardiomegaly": 0.95, "fibrosis": 0.05}))
    assert (found["cardiomegaly"].presence, found["cardiomegaly"].threshold) == (Presence.ABSENT, 0.95)
    assert (found["fibrosis"].presence, found["fibrosis"].threshold) == (Presence.PRESENT, 0.05)
    assert found["infiltration"].presence is Presence.PRESENT


def test_the_engines_own_word_stands_where_the_documented_threshold_does_not_explain_it(bench: Any) -> None:
    bench.server.misbehave("contradiction")
    cardiomegaly = by_key(bench.run())["cardiomegaly"]
    assert (cardiomegaly.presence, cardiomegaly.confidence) == (Presence.ABSENT, 0.91)
    assert cardiomegaly.threshold is None


def test_names_are_matched_however_spelled_and_unknown_ones_are_kept_under_a_private_code(bench: Any) -> None:
    bench.server.misbehave("spelling")
    findings = only(bench.run())
    assert findings.items[7].key == "nodule_mass" and findings.items[7].confidence == 0.22
    unknown = findings.items[-1]
    assert (unknown.key, unknown.name, unknown.code.scheme) == (
        "leapai_aortic_enlargement",
        "Aortic Enlargement",
        "99DICOMNODE",
    )
    assert (unknown.presence, unknown.code.meaning) == (Presence.PRESENT, "Aortic Enlargement")


def test_what_the_engine_does_not_speak_of_is_undetermined_not_absent(bench: Any) -> None:
    bench.server.misbehave("no-findings")
    findings = only(bench.run())
    assert {item.presence for item in findings.items} == {Presence.UNDETERMINED}
    assert len(findings.items) == 11
    assert "the engine's word for the image: Normal" in findings.notes
    assert "the engine said nothing of 11 of the 11 conditions" in findings.notes


def test_a_warning_is_kept_and_said(bench: Any) -> None:
    bench.server.misbehave("warning")
    findings = only(bench.run())
    assert 'the engine flagged its answer with a warning: "Image quality is low"' in findings.notes
    assert findings.items[1].presence is Presence.PRESENT


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_request_is_the_documented_one_with_a_bare_token_and_the_engines_path(bench: Any) -> None:
    image = bench.image()
    bench.run(image)
    (seen,) = bench.server.seen
    assert seen.headers["authorization"] == bench.token.read_text().strip()
    path = seen.request["input_image_path"]
    assert path.startswith(f"{CALLED}/2.25.") and path.endswith(".dcm")
    assert image.sop_instance_uid not in path
    assert seen.request["save_to_disk"] is False
    assert set(seen.request) == {"input_image_path", "save_to_disk", "patient_id"}
    assert seen.request["patient_id"].startswith("JOB-")


def test_bearer_is_an_option(bench: Any) -> None:
    bench.server.bearer = True
    assert len(only(bench.run(bearer=True)).items) == 11
    assert bench.server.seen[0].headers["authorization"].startswith("Bearer ey")
    with pytest.raises(EngineUnavailable, match="not valid"):
        bench.run()


def test_a_windows_engine_gets_a_windows_path(bench: Any) -> None:
    bench.run(engine_folder="D:\\in\\")
    assert bench.server.seen[0].request["input_image_path"].startswith("D:\\in\\2.25.")


def test_on_this_machine_the_image_leaves_as_it_is_and_is_recorded_as_identifiable(bench: Any) -> None:
    image = bench.image()
    bench.run(image)
    sent = pydicom.dcmread(io.BytesIO(bench.server.seen[0].file))
    assert (str(sent.PatientName), sent.SOPInstanceUID) == (NAME, image.sop_instance_uid)
    ((state, sending),) = bench.recorded
    assert (state, sending.identifiable, sending.bytes) == ("sent", True, len(bench.server.seen[0].file))


def test_another_machine_gets_no_identification_and_the_answer_finds_the_image_again(bench: Any) -> None:
    bench.host = "0.0.0.0"  # not loopback by the rule, and yet this machine
    image = bench.image()
    result = bench.run(image)
    assert only(result).sop_instance_uid == image.sop_instance_uid
    raw = bench.server.seen[0].file
    sent = pydicom.dcmread(io.BytesIO(raw))
    original = pydicom.dcmread(image.path)
    assert sent.PixelData == original.PixelData
    for keyword in ("PatientID", "PatientBirthDate", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID"):
        assert str(original[keyword].value).encode() not in raw, keyword
    assert b"SECRET" not in raw
    assert bench.recorded[0][1].identifiable is False
    assert bench.server.seen[0].request["input_image_path"].endswith(f"/{sent.SOPInstanceUID}.dcm")


def test_send_identifiable_lets_another_machine_see_the_patient(bench: Any) -> None:
    bench.host = "0.0.0.0"
    bench.run(send_identifiable=True)
    assert b"SECRET" in bench.server.seen[0].file
    assert bench.recorded[0][1].identifiable is True


def test_an_image_that_may_name_the_patient_in_its_pixels_is_refused_before_anything_is_written(bench: Any) -> None:
    bench.host = "0.0.0.0"
    image = bench.image()
    ds = pydicom.dcmread(image.path)
    ds.BurnedInAnnotation = "YES"
    ds.save_as(image.path)
    with pytest.raises(EngineRejected, match="Burned In Annotation"):
        bench.run(stored(Path(image.path)))
    assert bench.recorded == [] and bench.server.asked == [] and bench.notes == []


def test_only_frontal_images_are_sent_and_the_others_are_accounted_for(bench: Any) -> None:
    frontal, lateral = bench.image(1), bench.image(2)
    ds = pydicom.dcmread(lateral.path)
    ds.ViewPosition = "LL"
    ds.pop("ViewCodeSequence", None)
    ds.save_as(lateral.path)
    findings = only(bench.run(frontal, stored(Path(lateral.path))))
    assert findings.sop_instance_uid == frontal.sop_instance_uid
    assert "1 other image(s) of the series not analysed: the view is not PA or AP" in findings.notes
    with pytest.raises(EngineRejected, match="the view is not PA or AP"):
        bench.run(stored(Path(lateral.path)))


def test_the_view_may_be_coded_or_by_option_unknown(bench: Any) -> None:
    coded, silent = bench.image(1), bench.image(2, sop_class="CR", omit=("ViewPosition",))
    ds = pydicom.dcmread(coded.path)
    assert ds.ViewCodeSequence[0].CodeValue == "272479007"  # PA (PS3.16 CID 4010)
    del ds.ViewPosition
    ds.save_as(coded.path)
    assert len(only(bench.run(stored(Path(coded.path)))).items) == 11
    with pytest.raises(EngineRejected, match="the view is not given"):
        bench.run(silent)
    assert len(only(bench.run(silent, view_missing="allow")).items) == 11
    ds.ViewCodeSequence[0].CodeValue, ds.ViewCodeSequence[0].CodeMeaning = "399067008", "lateral"
    ds.save_as(coded.path)
    with pytest.raises(EngineRejected, match="the view is not PA or AP"):
        bench.run(stored(Path(coded.path)), view_missing="allow")


def test_raw_detector_values_are_not_sent(bench: Any) -> None:
    image = bench.image()
    ds = pydicom.dcmread(image.path)
    ds.PresentationIntentType = "FOR PROCESSING"
    ds.save_as(image.path)
    with pytest.raises(EngineRejected, match="FOR PROCESSING"):
        bench.run(stored(Path(image.path)))
    assert bench.server.asked == []


def test_several_jobs_may_be_run_at_a_time(bench: Any) -> None:
    engine = bench.engine()
    images = [bench.image(seed) for seed in range(1, 7)]
    with ThreadPoolExecutor(3) as pool:
        tasks = [bench.task(image, job=number) for number, image in enumerate(images, start=1)]
        results = list(pool.map(lambda task: engine.run(task, lambda: None), tasks))
    engine.close()
    assert [only(result).sop_instance_uid for result in results] == [image.sop_instance_uid for image in images]
    assert list(bench.shared.iterdir()) == []


def test_two_images_of_one_series_get_their_own_findings(bench: Any) -> None:
    one, two = bench.image(1), bench.image(2)
    result = bench.run(one, two)
    told = [value.sop_instance_uid for value in result.values if isinstance(value, Findings)]
    assert told == sorted([one.sop_instance_uid, two.sop_instance_uid])
    assert len({seen.request["input_image_path"] for seen in bench.server.seen}) == 2


# --- the shared folder -----------------------------------------------------------------------------------------------


def test_the_names_are_remembered_before_the_first_image_is_written(bench: Any) -> None:
    task = bench.task(bench.image())

    def remember(note: str) -> None:
        assert list(bench.shared.iterdir()) == []
        raise LeaseLost("another worker does it")

    with pytest.raises(LeaseLost):
        bench.engine().run(replace(task, remember=remember), lambda: None)
    assert bench.server.asked == [] and list(bench.shared.iterdir()) == []


def test_what_a_crash_left_is_removed_by_the_next_try_and_by_the_end_of_the_job(bench: Any) -> None:
    image = bench.image()
    bench.run(image)
    (note,) = bench.notes
    assert "2.25." not in note.splitlines()[0]
    left = bench.shared / note.splitlines()[1]
    other = bench.shared / "another.dcm"
    engine = bench.engine()
    removals: tuple[Callable[[], Any], ...] = (
        lambda: engine.cancel_noted(note),
        lambda: engine.run(bench.task(image, note=note), lambda: None),
    )
    for remove in removals:
        left.write_bytes(b"DICM")
        left.with_suffix(".part").write_bytes(b"DI")
        other.write_bytes(b"not ours")
        remove()
        assert list(bench.shared.iterdir()) == [other]
    engine.cancel_noted("../../etc/passwd\n../x.dcm\n2.25.1/../y.dcm")
    engine.close()


def test_a_missing_shared_folder_is_an_outage_and_check_names_the_option(bench: Any, tmp_path: Path) -> None:
    engine = bench.engine(node_folder=str(tmp_path / "unmounted"))
    with pytest.raises(ConfigError, match=r"engines\.cxr\.options\.node_folder"):
        engine.check()
    with pytest.raises(EngineUnavailable, match="shared folder"):
        engine.run(bench.task(bench.image()), lambda: None)
    assert "shared folder" in engine.trouble
    engine.close()


def test_an_engine_that_sees_another_folder_is_an_outage_that_says_so(bench: Any) -> None:
    with pytest.raises(EngineUnavailable, match="node_folder and engine_folder"):
        bench.run(engine_folder="/elsewhere")
    with pytest.raises(ConfigError, match=r"engines\.cxr\.options\.engine_folder: expected an absolute path"):
        bench.engine(engine_folder="/share/../etc")


# --- errors ----------------------------------------------------------------------------------------------------------

DOCUMENTED = [
    (400, "input_image_path is required in the request", EngineError),
    (400, "save_to_disk is required in the request", EngineError),
    (400, "Invalid path input_image_path: /x/y", EngineUnavailable),
    (400, "Input image path does not exist: /x/y", EngineUnavailable),
    (400, "Requested image is not a DICOM file: /x/y", EngineRejected),
    (400, "Invalid DICOM image, unable to fetch patient ID: John Doe", EngineRejected),
    (400, "Invalid patient_id: 'x' in request body", EngineError),
    (400, "Patient ID is empty or None in the image", EngineRejected),
    (400, "Invalid value for save_to_disk, should be a boolean: no", EngineError),
    (400, "output_folder_path is required in the request when save_to_disk is True", EngineError),
    (500, "Unable to create output folder: /x", EngineUnavailable),
    (500, "Single Inference failed due to an internal error", EngineCrashed),
    (400, "input_folder_path is required in the request", EngineError),
    (400, "Invalid path input_folder_path: /x", EngineUnavailable),
    (400, "Input folder path does not exist: /x", EngineUnavailable),
    (400, "No Dicom images found in the provided path", EngineUnavailable),
    (500, "Bulk inference failed due to an internal error", EngineCrashed),
    (401, "Token missing", EngineUnavailable),
    (401, "Token expired", EngineUnavailable),
    (401, "Invalid token", EngineUnavailable),
    (401, "whatever", EngineUnavailable),
    (415, "Unsupported Media Type", EngineError),
    (400, "something new about Mr Doe", EngineRejected),
    (500, "something new about Mr Doe", EngineCrashed),
]


@pytest.mark.parametrize(("status", "message", "kind"), DOCUMENTED)
def test_every_documented_error_becomes_one_of_ours_and_repeats_nothing(
    status: int, message: str, kind: type[EngineError]
) -> None:
    body = json.dumps({"Result": "Failure", "Data": None, "Message": message}).encode()
    with pytest.raises(EngineError) as caught:
        answers.prediction_of("cxr", status, body, sop_instance_uid="1.2")
    assert type(caught.value) is kind
    assert caught.value.http_status == status
    assert "Doe" not in str(caught.value) and "/x" not in str(caught.value)


def test_every_message_of_the_vendors_table_has_a_row_of_its_own() -> None:
    for status, message, _ in DOCUMENTED[:20]:
        said = message.casefold()
        assert sum(said.startswith(start) for start, *_ in answers._ERRORS) == 1, (status, message)


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ("failure", EngineCrashed, "failed on this image"),
        ("failure-undocumented", EngineError, "not in its documentation"),
        ("crash", EngineCrashed, "failed on this image"),
        ("no-folder", EngineUnavailable, "output folder"),
        ("garbage", EngineError, "not its interface"),
        ("html-401", EngineUnavailable, "refuses the token"),
        ("other-image", EngineError, "about another image"),
        ("twice", EngineError, "named a finding twice"),
        ("no-data", EngineError, "without Data"),
        ("bad-confidence", EngineError, "confidence"),
    ],
)
def test_an_engine_that_does_wrong_is_told_as_what_it_is(
    bench: Any, wrong: str, kind: type[EngineError], says: str
) -> None:
    bench.server.misbehave(wrong)
    with pytest.raises(EngineError, match=says) as caught:
        bench.run()
    assert type(caught.value) is kind
    assert "Doe" not in str(caught.value)
    assert bench.recorded[0][0] == "failed"


@pytest.mark.parametrize("wrong", ["drop", "unavailable", "partial"])
def test_a_lost_answer_is_asked_for_again_because_an_inference_changes_nothing(bench: Any, wrong: str) -> None:
    bench.server.misbehave(wrong)
    assert len(only(bench.run()).items) == 11
    assert len(bench.server.seen) == 2
    assert [state for state, _ in bench.recorded] == ["sent"]


def test_a_silent_engine_is_a_timeout_and_the_image_is_taken_back(bench: Any) -> None:
    bench.server.misbehave("slow")
    with pytest.raises(EngineTimeout):
        bench.run(read_timeout_s=0.5, retries=0)


def test_a_dead_engine_is_unavailable_and_then_rests(bench: Any, free_port: Callable[[], int]) -> None:
    engine = bench.engine(base_url=f"http://127.0.0.1:{free_port()}", retries=0, breaker_failures=1)
    with pytest.raises(EngineUnavailable):
        engine.run(bench.task(bench.image()), lambda: None)
    assert engine.gauges()["breaker_state"] == 1.0
    assert "rests" in engine.trouble
    assert list(bench.shared.iterdir()) == []
    engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.run(bench.task(bench.image()), lambda: None)


def test_a_lost_lease_takes_the_image_back(bench: Any) -> None:
    bench.server.misbehave("slow")
    asked = [0]

    def beat() -> None:
        asked[0] += 1
        if bench.server.seen:
            raise LeaseLost("gone")

    engine = bench.engine()
    with pytest.raises(LeaseLost):
        engine.run(bench.task(bench.image()), beat)
    assert asked[0] > 0 and list(bench.shared.iterdir()) == []
    engine.close()


def test_one_image_refused_does_not_cost_the_other_its_findings(bench: Any) -> None:
    one, two = sorted((bench.image(1), bench.image(2)), key=lambda image: image.sop_instance_uid)
    image = replace(one, data_set_length=one.data_set_length + 10**6)  # its file is shorter than it should be
    findings = only(bench.run(image, two))
    assert findings.sop_instance_uid == two.sop_instance_uid
    assert any("shorter than it should be" in note for note in findings.notes)


def test_an_engine_exchanged_between_two_images_is_asked_again(bench: Any) -> None:
    bench.server.misbehave("old-version")
    with pytest.raises(EngineUnavailable, match="version changed"):
        bench.run(bench.image(1), bench.image(2))


def test_requests_are_observed_as_what_they_came_to(bench: Any) -> None:
    heard: list[tuple[str, str]] = []
    engine = bench.engine(retries=0)
    engine.observe(lambda name, outcome, seconds: heard.append((name, outcome)))
    for wrong in ("", "other-image", "no-folder", "unavailable"):
        if wrong:
            bench.server.misbehave(wrong)
        try:
            engine.run(bench.task(bench.image()), lambda: None)
        except EngineError:
            continue
    engine.close()
    assert heard == [("cxr", "ok"), ("cxr", "error"), ("cxr", "unavailable"), ("cxr", "unavailable")]


# --- the token -------------------------------------------------------------------------------------------------------


def test_an_expired_token_is_an_outage_with_its_reason_until_a_new_one_lies_there(bench: Any) -> None:
    good = bench.token.read_text()
    bench.token.write_text(leap.issue(time.time() - 86400))
    engine, task = bench.engine(), bench.task(bench.image())
    with pytest.raises(EngineUnavailable, match="token has expired"):
        engine.run(task, lambda: None)
    assert "expired" in engine.trouble
    assert engine.gauges()["token_expires_seconds"] == pytest.approx(-86400, abs=60)
    with pytest.raises(EngineUnavailable, match="expired"):
        engine.report()
    bench.token.write_text(good)
    with pytest.raises(EngineRejected, match="no CR and no DX"):
        mammogram = replace(task.instances[0], sop_class_uid="1.2.840.10008.5.1.4.1.1.1.2")
        engine.run(replace(task, instances=(mammogram,)), lambda: None)
    assert "expired" in engine.trouble, "nobody asked the engine yet"
    engine.run(task, lambda: None)
    assert engine.trouble == ""
    engine.close()


def test_a_missing_token_is_a_wrong_setting_when_checked_and_an_outage_when_a_job_waits(bench: Any) -> None:
    bench.token.unlink()
    engine = bench.engine()
    with pytest.raises(ConfigError, match="cannot be read"):
        engine.check()
    assert "cannot be read" in engine.trouble
    assert engine.gauges() == {"breaker_state": 0.0}
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        engine.run(bench.task(bench.image()), lambda: None)
    assert list(bench.shared.iterdir()) == []
    engine.close()


def test_the_end_of_the_token_is_told_and_warned_of_once_a_day_from_three_days_before(
    bench: Any, moved_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    moved_clock.at = datetime.now(UTC)
    ends = moved_clock.at + timedelta(days=30)
    bench.token.write_text(leap.issue(ends.timestamp()))
    engine = bench.engine(clock=moved_clock)
    with caplog.at_level(logging.WARNING, "dicom_node.engines._leapai_client"):
        assert engine.gauges()["token_expires_seconds"] == pytest.approx(30 * 86400, abs=2)
        moved_clock.move(26.9 * 86400)
        engine.gauges()
        assert caplog.records == []
        moved_clock.move(0.2 * 86400)
        engine.gauges()
        engine.gauges()
        assert [record.message for record in caplog.records] == ["an engine's token expires soon"]
        moved_clock.move(86401)
        engine.gauges()
        assert len(caplog.records) == 2
    assert bench.token.read_text() not in caplog.text
    engine.close()


@pytest.mark.parametrize(
    "token", ["", "x", "a.b.c", "a.e30.c", "a.eyJleHAiOiJ4In0.c", "a.eyJleHAiOjFlOTl9.c", "a.MQ.c"]
)
def test_a_token_that_does_not_say_when_it_ends_does_no_harm(token: str) -> None:
    assert answers.token_expiry(token) is None


def test_the_report_asks_ping_without_the_token_and_tries_the_token_without_an_image(bench: Any) -> None:
    engine = bench.engine()
    engine.check()
    told = dict(engine.report())
    engine.close()
    assert "takes the token" in told["reached"]
    assert told["token"].startswith("expires in 30.0 days") or told["token"].startswith("expires in 29.9")
    assert told["what leaves"] == "images as they are, with the patient's name"
    ping, probe = bench.server.asked
    assert ping[:2] == ("GET", "/ping") and "Authorization" not in ping[2] and "authorization" not in ping[2]
    assert probe[:2] == ("POST", "/single_inference")
    assert bench.server.seen == []
    assert bench.token.read_text().strip() not in json.dumps(told)


def test_the_options_are_checked_by_name_and_the_token_is_never_a_value(bench: Any) -> None:
    for key, value, says in [
        ("token", "eyJhbGciOi.secret.x", "never the value itself"),
        ("node_folder", "relative", "absolute"),
        ("engine_folder", "relative", "absolute"),
        ("thresholds", {"gout": 0.5}, "'gout' is none of"),
        ("base_url", "leap:8500", "expected http"),
        ("save_to_disk", True, "unknown key"),
    ]:
        with pytest.raises(ConfigError, match=rf"engines\.cxr\.options\.{key}.*{says}") as caught:
            bench.engine(**{key: value})
        assert "secret.x" not in str(caught.value)


# --- from rule to report ---------------------------------------------------------------------------------------------


def test_the_example_rule_sends_a_frontal_chest_to_the_engine_and_its_findings_become_a_report(
    bench: Any, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "leapai.yaml").write_bytes((ROOT / "routing_rules" / "examples" / "leapai.yaml").read_bytes())
    image = bench.image()
    task = bench.task(image)
    view = SeriesView(
        study_instance_uid=image.study_instance_uid,
        revision=1,
        header=task.header,
        source=Source(calling_ae_title="DX1", called_ae_title="DICOM_NODE", address="127.0.0.1"),
        origins=frozenset({Origin.RECEIVED}),
        study_series_count=1,
        study_instance_count=1,
        study_modalities=("DX",),
        received_at=datetime(2026, 3, 1, tzinfo=UTC),
    )
    loaded = load_rules(rules, engines={"leapai-cxr"}, destinations={"PACS"})
    (job,) = loaded.evaluate(view, now=view.received_at, destination_of={"DX1": "PACS"}.get).jobs
    assert (job.engine, job.results, job.destinations) == ("leapai-cxr", ("sr", "sc"), ("PACS",))
    result = bench.run(image)
    context = result_context(
        result.provenance,
        series_instance_uid=image.series_instance_uid,
        input_digest="d",
        rule=job.rule,
        run="1",
        run_number=1,
        created_at=view.received_at,
        time_zone="+0000",
        node_name="DICOM_NODE",
    )
    (report,) = encoded(result, task, context, encoders=[SrEncoder()], kinds=job.results, heartbeat=lambda: None)
    assert (report.Modality, str(report.PatientName)) == ("SR", NAME)
    meanings = [meaning for meaning in _meanings(report)]
    assert meanings.count("Present") == 4 and meanings.count("Absent") == 7
    (reference,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = reference.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image.sop_instance_uid


def storescu(tool: Callable[[str], str], node: Any, sender: str, image: StoredInstance) -> None:
    words = ("-aet", sender, "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port), image.path)
    subprocess.run([tool("storescu"), *words], check=True, capture_output=True, timeout=60)


def catalog_of(node: Any) -> closing[Catalog]:
    return closing(open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0)))


def test_a_real_node_asks_the_engine_and_keeps_the_report_and_the_sending(
    bench: Any,
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    tmp_path: Path,
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    rule = (ROOT / "routing_rules" / "examples" / "leapai.yaml").read_text()
    (rules / "leapai.yaml").write_text(rule.replace("send:\n  to: [sender]\n  what: results\n", ""))
    engine = {"kind": "leapai", "options": bench.options()}
    node = running_node(rules_dir=str(rules), engines={"leapai-cxr": engine})
    assert "takes the token" in node.command("engines", "check", "leapai-cxr").stdout
    image = bench.image()
    storescu(tool, node, "DX1", image)

    def done() -> bool:
        return "done" in node.command("jobs", "list").stdout

    wait_for(done, 60.0, f"the job; {node.tail()}")
    timeline = node.command("timeline", image.study_instance_uid).stdout
    assert "leapai-cxr" in timeline and "sent" in timeline
    assert "SECRET" not in timeline + node.log.read_text()
    assert bench.token.read_text().strip() not in node.log.read_text()
    assert len(bench.server.seen) == 1 and list(bench.shared.iterdir()) == []
    assert 'engine="leapai-cxr",outcome="ok"' in node.get("/metrics")[1]


@pytest.mark.crash
def test_an_engine_that_is_down_loses_no_job_and_takes_urgent_ones_first_when_it_is_back(
    bench: Any,
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    rules, port = tmp_path / "rules", free_port()
    rules.mkdir()
    for sender, priority in (("ROUTINE", "routine"), ("URGENT", "urgent")):
        (rules / f"{priority}.yaml").write_text(
            f"rule: {priority}\nwhen: [source.calling_ae_title == '{sender}']\n"
            f"run: {{engine: leapai-cxr, priority: {priority}, results: [sr]}}\n"
        )
    options = bench.options() | {"base_url": f"http://127.0.0.1:{port}", "breaker_failures": 2, "breaker_rest_s": 4.0}
    node = running_node(
        rules_dir=str(rules),
        engines={"leapai-cxr": {"kind": "leapai", "options": options}},
        jobs={"max_attempts": 2, "backoff_s": 0.1, "backoff_max_s": 0.5},
    )

    def send(sender: str, seed: int) -> str:
        image = bench.image(seed)
        storescu(tool, node, sender, image)
        return str(image.sop_instance_uid)

    def states() -> list[str]:
        with catalog_of(node) as ours:
            return [job.state.value for job in ours.queue.jobs()]

    routine = [send("ROUTINE", seed) for seed in range(1, 9)]
    resting = 'dicom_node_engine_breaker_state{engine="leapai-cxr"} 1.0'
    wait_for(lambda: resting in node.get("/metrics")[1], 40.0, f"the breaker to open; {node.tail()}")
    urgent = [send("URGENT", seed) for seed in range(11, 15)]
    wait_for(lambda: len(states()) == 12, 40.0, "all jobs")
    time.sleep(3.0)  # a dozen of delays between attempts
    assert not {"failed", "done"} & set(states())
    with leap.LeapAi(mounts={CALLED: bench.shared}, port=port) as back:
        wait_for(lambda: set(states()) == {"done"}, 60.0, f"the jobs; {node.tail()}")
        asked = [str(pydicom.dcmread(io.BytesIO(one.file)).SOPInstanceUID) for one in back.seen]
    assert sorted(asked) == sorted(routine + urgent), "each once"
    assert max(map(asked.index, urgent)) <= len(urgent) + 2, "the probe, and what two workers had taken, may be first"


@pytest.mark.crash
def test_a_worker_that_dies_again_and_again_holds_up_nobody_but_its_jobs(
    bench: Any,
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    tmp_path: Path,
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "all.yaml").write_text("rule: all\nwhen: [Modality == 'DX']\nrun: {engine: leapai-cxr, results: [sr]}\n")
    bench.server.misbehave("slow", 2)  # so that it dies with jobs in hand
    node = running_node(
        rules_dir=str(rules),
        engines={"leapai-cxr": {"kind": "leapai", "options": bench.options()}},
        jobs={"lease_s": 2.0, "backoff_s": 0.1, "backoff_max_s": 0.5},
    )
    last, studies = 0, []
    for seed in range(1, 6):
        wait_for(lambda last=last: node.pid("work") != last, 60.0, f"the worker to be there again; {node.tail()}")
        image = bench.image(seed)
        studies.append(image.study_instance_uid)
        storescu(tool, node, "DX1", image)
        assert node.get("/ping")[0] == 200
        last = node.pid("work")
        os.kill(last, signal.SIGKILL)

    with catalog_of(node) as ours:

        def states() -> list[str]:
            return [job.state.value for job in ours.queue.jobs()]

        wait_for(lambda: states() == ["done"] * 5, 120.0, f"the jobs; {node.tail()}")
        kept = ours.index.instances(Level.STUDY, {"StudyInstanceUID": studies})
        assert sorted(one.modality for one in kept) == ["DX"] * 5 + ["SR"] * 5


def _meanings(ds: Dataset) -> Iterator[str]:
    """The meaning of every coded value."""
    for item in ds.get("ContentSequence", []):
        for concept in item.get("ConceptCodeSequence", []):
            yield str(concept.CodeMeaning)
        yield from _meanings(item)


def test_the_server_runs_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engines.servers.leapai", "--port", "0", "--mount", f"/in={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url, token = process.stdout.readline().strip(), process.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}/ping", timeout=10) as answer:
                assert json.load(answer) == {"status": "ok"}
            assert answers.token_expiry(token) is not None
        finally:
            process.terminate()
            process.wait(10)
