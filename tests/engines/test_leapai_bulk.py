"""LeapAI CXR: whole series at once with every image accounted for; heatmaps and reports, bounded and checked."""

import importlib.util
import logging
import os
import stat
import struct
import sys
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import pytest

from dicom_node.engines import _leapai_pictures as pictures
from dicom_node.engines import _leapai_series as series_module
from dicom_node.engines._leapai_folder import SharedFolder, new_job_folder
from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.errors import (
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
)
from dicom_node.pipeline.encode import encoded, result_context
from dicom_node.plugins import encoder_class
from dicom_node.values import Document, EngineResult, Findings, Picture

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    name = "leapai_bulk_bench"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "leapai_bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kit = _load()
bench, leap, stored, only = kit.bench, kit.leap, kit.stored, kit.only


def three(bench: Any) -> list[Any]:
    return [bench.image(seed) for seed in (1, 2, 3)]


def findings(result: EngineResult) -> list[Findings]:
    return [value for value in result.values if isinstance(value, Findings)]


def of(result: EngineResult, kind: type[Any]) -> list[Any]:
    return [value for value in result.values if isinstance(value, kind)]


def paths(bench: Any) -> list[str]:
    return [path for method, path, _ in bench.server.asked if method == "POST"]


# --- all at once


def test_a_series_is_asked_about_in_one_call_and_every_image_has_its_findings(bench: Any) -> None:
    images = three(bench)
    result = bench.run(*images, bulk=True)
    assert paths(bench) == ["/bulk_inference"]
    assert [one.sop_instance_uid for one in findings(result)] == sorted(image.sop_instance_uid for image in images)
    assert all(len(one.items) == 11 for one in findings(result))
    assert not any("alone" in note for one in findings(result) for note in one.notes)
    (seen,) = bench.server.seen
    assert set(seen.request) == {"input_folder_path", "output_folder_path"}
    assert seen.request["input_folder_path"].startswith(f"{kit.CALLED}/2.25.")
    assert seen.request["input_folder_path"].endswith(".job/in")
    assert [state for state, _ in bench.recorded] == ["sent"] * 3
    assert {sending.identifiable for _, sending in bench.recorded} == {False}
    assert all(sending.bytes and sending.sha256 for _, sending in bench.recorded)


def test_together_images_leave_without_the_patient_even_for_this_machine_and_each_as_another(bench: Any) -> None:
    images = three(bench)
    bench.run(*images, bulk=True)
    sent = bench.server.seen[0].file
    assert b"SECRET" not in sent
    for image in images:
        assert image.sop_instance_uid.encode() not in sent
        assert str(pydicom.dcmread(image.path, stop_before_pixels=True).PatientID).encode() not in sent
    assert len({bytes(part[:30]) for part in sent.split(b"JOB-")[1:]}) >= 3, "one Patient ID would overwrite the other"


def test_a_windows_engine_gets_windows_folders(bench: Any) -> None:
    bench.run(*three(bench), bulk=True, engine_folder="D:\\in")
    request = bench.server.seen[0].request
    assert request["output_folder_path"].startswith("D:\\in\\2.25.") and request["output_folder_path"].endswith("\\out")


@pytest.mark.parametrize(("wrong", "missing"), [("skip", 1), ("skip-all", 3), ("half", 3), ("link", 3)])
def test_what_the_engine_leaves_out_is_asked_about_alone_and_said(
    bench: Any, wrong: str, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench.server.misbehave(wrong)
    with caplog.at_level(logging.WARNING, "dicom_node.engines"):
        result = bench.run(*three(bench), bulk=True)
    assert paths(bench) == ["/bulk_inference"] + ["/single_inference"] * missing
    assert len(findings(result)) == 3
    note = f"of 3 images together the engine left {missing} out: asked about alone"
    assert all(note in one.notes for one in findings(result))
    told = next(record for record in caplog.records if record.message == "a bulk inference left images out")
    assert told.left_out == missing  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["crash", "refused"])
def test_an_image_that_fails_alone_too_is_told_beside_the_results_of_the_others(bench: Any, how: str) -> None:
    images = three(bench)
    bench.server.misbehave("skip")
    bench.server.misbehave("crash" if how == "crash" else "patient")
    result = bench.run(*images, bulk=True)
    assert len(findings(result)) == 2
    assert all("1 other image(s) of the series not analysed: " in " ".join(one.notes) for one in findings(result))


def test_a_series_none_of_which_gets_an_answer_fails_as_what_it_is(bench: Any) -> None:
    bench.server.misbehave("skip-all")
    bench.server.misbehave("crash", 3)
    with pytest.raises(EngineCrashed):
        bench.run(*three(bench), bulk=True)


def test_when_the_engine_fails_on_all_of_them_each_is_asked_about_alone(bench: Any) -> None:
    bench.server.misbehave("bulk-crash")
    result = bench.run(*three(bench), bulk=True)
    assert paths(bench) == ["/bulk_inference"] + ["/single_inference"] * 3
    assert all("the engine failed on the images together" in " ".join(one.notes) for one in findings(result))
    assert [state for state, _ in bench.recorded] == ["failed"] * 3 + ["sent"] * 3


def test_an_image_that_cannot_be_pseudonymised_goes_alone_where_it_may(bench: Any) -> None:
    images = three(bench)
    ds = pydicom.dcmread(images[0].path)
    ds.BurnedInAnnotation = "YES"
    ds.save_as(images[0].path)
    images[0] = stored(Path(images[0].path))
    result = bench.run(*images, bulk=True)
    assert paths(bench) == ["/bulk_inference", "/single_inference"] and len(findings(result)) == 3
    assert sorted(state for state, _ in bench.recorded) == ["failed", "sent", "sent", "sent"]
    bench.host, bench.server.asked[:], bench.recorded[:] = "0.0.0.0", [], []
    result = bench.run(*images, bulk=True)
    assert paths(bench) == ["/bulk_inference"] and len(findings(result)) == 2
    assert "not analysed: " in " ".join(findings(result)[0].notes)


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [("no-images", EngineUnavailable, "node_folder"), ("failure", EngineCrashed, None), ("warning", None, None)],
)
def test_answers_to_the_bulk_call_mean_what_the_vendors_table_says(
    bench: Any, wrong: str, kind: type[EngineError] | None, says: str | None
) -> None:
    bench.server.misbehave(wrong)
    if says is not None and kind is not None:
        with pytest.raises(kind, match=says):
            bench.run(*three(bench), bulk=True)
        return
    result = bench.run(*three(bench), bulk=True)
    assert len(findings(result)) == 3
    if wrong == "warning":
        said = 'the engine flagged its answer for the whole series with a warning: "Image quality is low"'
        assert all(said in one.notes for one in findings(result))


def test_a_bulk_call_whose_answer_is_lost_is_not_repeated_into_the_same_folder(bench: Any) -> None:
    images = three(bench)
    bench.server.misbehave("drop")
    with pytest.raises(EngineUnavailable):
        bench.run(*images, bulk=True)
    assert paths(bench) == ["/bulk_inference"]
    result = bench.run(*images, bulk=True)
    assert len(findings(result)) == 3
    first, second = (seen.request["output_folder_path"] for seen in bench.server.seen)
    assert first != second, "the engine may still write to the first one"


def test_a_silent_bulk_call_is_a_timeout_and_everything_is_taken_back(bench: Any) -> None:
    bench.server.misbehave("slow")
    with pytest.raises(EngineTimeout):
        bench.run(*three(bench), bulk=True, read_timeout_s=0.5)


# --- the job's own folder


def test_what_a_kill_left_is_removed_by_the_next_try_and_by_the_cancellation(bench: Any) -> None:
    images = three(bench)
    engine = bench.engine(bulk=True)
    task = bench.task(*images)
    engine.run(task, lambda: None)
    (name,) = [line for line in bench.notes[-1].splitlines() if line.endswith(".job")]
    for removed in ("run", "cancel"):
        (bench.shared / name / "in").mkdir(parents=True)
        (bench.shared / name / "in" / "2.25.1.dcm").write_bytes(b"left")
        (bench.shared / name / "out" / "JOB-1").mkdir(parents=True)
        (bench.shared / "2.25.1.job").mkdir()  # of another job: nobody's business
        if removed == "run":
            engine.run(replace(task, note=bench.notes[-1]), lambda: None)
        else:
            engine.cancel_noted(f"images\n{name}\n../escape\n/etc")
        assert [path.name for path in bench.shared.iterdir()] == ["2.25.1.job"]
        (bench.shared / "2.25.1.job").rmdir()
    engine.close()


def test_a_folder_that_could_not_be_removed_stays_in_the_note(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = new_job_folder()
    (bench.shared / name).mkdir()
    monkeypatch.setattr("dicom_node.engines._leapai_folder._remove_folder", _refuse)
    engine = bench.engine()
    engine.run(replace(bench.task(bench.image()), note=f"x\n{name}"), lambda: None)
    assert name in bench.notes[-1].splitlines()
    with pytest.raises(EngineUnavailable):
        engine.cancel_noted(bench.notes[-1])
    engine.close()


def test_what_an_engine_writes_after_it_was_given_up_is_removed_by_the_next_run(bench: Any) -> None:
    engine = bench.engine(bulk=True, read_timeout_s=0.3)
    bench.server.misbehave("slow")
    with pytest.raises(EngineTimeout):
        engine.run(bench.task(*three(bench)), lambda: None)
    assert list(bench.shared.iterdir()) == []
    (name,) = [line for line in bench.notes[-1].splitlines() if line.endswith(".job")]
    (bench.shared / name / "out" / "JOB-1").mkdir(parents=True)
    engine.run(bench.task(bench.image(9), job=8), lambda: None)
    assert list(bench.shared.iterdir()) == []
    engine.close()


def _refuse(path: Path) -> None:
    raise PermissionError(13, "Permission denied")


def test_nothing_is_written_before_the_folder_is_remembered_and_a_lost_lease_takes_it_back(bench: Any) -> None:
    task = bench.task(*three(bench))

    def remember(note: str) -> None:
        assert list(bench.shared.iterdir()) == [] and ".job" in note
        raise LeaseLost("another worker does it")

    engine = bench.engine(bulk=True)
    with pytest.raises(LeaseLost):
        engine.run(replace(task, remember=remember), lambda: None)
    bench.server.misbehave("slow")

    def beat() -> None:
        if bench.server.seen:
            raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        engine.run(task, beat)
    assert list(bench.shared.iterdir()) == []
    engine.close()


@pytest.mark.parametrize(("mode", "folders"), [("0600", 0o700), ("0640", 0o2770), ("0644", 0o777)])
def test_the_engine_may_write_where_it_is_to_write_and_only_who_may(bench: Any, mode: str, folders: int) -> None:
    shared = SharedFolder("cxr", LeapAiOptions(**bench.options(file_mode=mode)))
    name = new_job_folder()
    with shared.job_folder(name):
        for part in ("", "in", "out"):
            found = stat.S_IMODE((bench.shared / name / part).stat().st_mode)
            assert found | 0o2000 == folders | 0o2000  # the group bit may be refused to who is not in the group
    assert list(bench.shared.iterdir()) == []


def test_only_plain_files_within_bounds_are_read_back_and_never_through_a_link(bench: Any, tmp_path: Path) -> None:
    shared = SharedFolder("cxr", LeapAiOptions(**bench.options()))
    name, secret = new_job_folder(), tmp_path / "secret"
    secret.mkdir()
    (secret / "P_a.json").write_bytes(b"secret")
    with shared.job_folder(name):
        out = bench.shared / name / "out"
        (out / "P").mkdir()
        assert shared.written(name, "P", "a.json", 10) is None
        (out / "P" / "P_a.json").write_bytes(b"0123456789")
        assert shared.written(name, "P", "a.json", 10) == b"0123456789"
        assert shared.written(name, "P", "a.json", 9) is None
        (out / "P" / "P_a.json").unlink()
        (out / "P" / "P_a.json").symlink_to(secret / "P_a.json")
        assert shared.written(name, "P", "a.json", 10) is None
        os.mkfifo(out / "P" / "P_b.json")
        assert shared.written(name, "P", "b.json", 10) is None
        (out / "Q").symlink_to(secret)
        (secret / "Q_a.json").write_bytes(b"secret")
        assert shared.written(name, "Q", "a.json", 10) is None
    assert (secret / "P_a.json").exists() and list(bench.shared.iterdir()) == []


# --- heatmaps


@pytest.mark.parametrize("bulk", [False, True])
def test_the_heatmap_of_each_image_comes_as_a_picture_about_it(bench: Any, bulk: bool) -> None:
    images = three(bench)
    result = bench.run(*images, bulk=bulk)
    drawn = of(result, Picture)
    assert [one.sop_instance_uid for one in drawn] == sorted(image.sop_instance_uid for image in images)
    assert all(one.pixels.shape == (64, 64, 3) and one.pixels.dtype == np.uint8 for one in drawn)
    assert of(bench.run(*images, bulk=bulk, heatmap="none"), Picture) == []


@pytest.mark.parametrize(("wrong", "says"), [("bomb", "60000 x 60000"), ("no-png", "no PNG")])
def test_a_heatmap_that_is_none_is_left_out_kept_for_a_person_and_said(bench: Any, wrong: str, says: str) -> None:
    bench.server.misbehave(wrong)
    result = bench.run(bench.image())
    assert of(result, Picture) == [] and len(only(result).items) == 11
    assert any(note.startswith("the engine's heatmap is left out: ") and says in note for note in only(result).notes)
    ((content, reason),) = bench.kept
    assert says in reason and content


def test_a_heatmap_of_other_proportions_is_left_out_unless_it_is_wanted(bench: Any) -> None:
    bench.server.misbehave("other-shape", 2)
    result = bench.run(bench.image())
    assert of(result, Picture) == [] and "(64 x 32, the image 64 x 64)" in " ".join(only(result).notes)
    assert len(bench.kept) == 1
    (picture,) = of(bench.run(bench.image(), heatmap="any-shape"), Picture)
    assert picture.pixels.shape == (32, 64, 3)


def test_grey_is_kept_grey_and_what_is_transparent_lies_on_black(bench: Any) -> None:
    bench.server.misbehave("grey")
    (grey,) = of(bench.run(bench.image()), Picture)
    assert grey.pixels.shape == (64, 64) and grey.pixels.max() == 200
    bench.server.misbehave("alpha")
    (alpha,) = of(bench.run(bench.image()), Picture)
    assert alpha.pixels.shape == (64, 64, 3) and alpha.pixels[0, 0, 0] == round(200 * 200 / 255)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_a_png_is_never_decoded_beyond_its_bounds() -> None:
    good = leap.png(5, 3)
    assert pictures.picture_of(good).shape == (3, 5, 3)
    sixteen = (
        good[:8]
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))
        + _chunk(b"IDAT", zlib.compress(b"\0\xff\xff\x80\x00"))
        + _chunk(b"IEND", b"")
    )
    assert pictures.picture_of(sixteen).tolist() == [[255, 128]]
    text_bomb = good[:33] + _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(200_000_000))) + good[33:]
    for bad in (
        b"",
        good[:20],
        good[:40],
        leap.png(4, 4)[:16] + struct.pack(">II", 0, 4) + good[24:],
        leap.png(4, 4)[:16] + struct.pack(">II", 16384, 16384) + good[24:],
        text_bomb,
    ):
        with pytest.raises(pictures.Unfit):
            pictures.picture_of(bad)
    for text in (7, "/out/JOB-1/JOB-1_heatmap.png", "é"):
        with pytest.raises(pictures.Unfit, match="base64"):
            pictures.png_of(text)


def test_pictures_of_one_series_are_bounded_together(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_module, "MAX_KEPT_BYTES", 2 * 64 * 64 * 3)
    result = bench.run(*three(bench), bulk=True)
    assert (len(findings(result)), len(of(result, Picture))) == (3, 2)
    assert "pictures and reports" in " ".join(findings(result)[-1].notes)


# --- reports


@pytest.mark.parametrize("bulk", [False, True])
def test_a_report_comes_only_when_it_is_wanted(bench: Any, bulk: bool) -> None:
    images = three(bench)
    assert of(bench.run(*images, bulk=bulk), Document) == []
    result = bench.run(*images, bulk=bulk, report=True)
    documents = of(result, Document)
    assert [one.sop_instance_uids for one in documents] == sorted((image.sop_instance_uid,) for image in images)
    assert {one.pdf for one in documents} == {leap.PDF} and len(of(result, Picture)) == 3


def test_for_a_report_the_engine_writes_into_a_folder_of_the_image_alone(bench: Any) -> None:
    bench.run(*three(bench), report=True)
    requests = [seen.request for seen in bench.server.seen]
    assert all(request["save_to_disk"] is True for request in requests)
    assert len({request["output_folder_path"] for request in requests}) == 3
    assert len({request["patient_id"] for request in requests}) == 3


@pytest.mark.parametrize(("wrong", "says"), [("bad-report", "no PDF"), ("no-report", "wrote none")])
def test_a_report_that_is_none_is_left_out_and_said(bench: Any, wrong: str, says: str) -> None:
    bench.server.misbehave(wrong)
    result = bench.run(bench.image(), report=True)
    assert of(result, Document) == [] and len(only(result).items) == 11
    assert says in " ".join(only(result).notes)
    assert [content for content, _ in bench.kept] == ([b"<html>"] if wrong == "bad-report" else [])


# --- one image that fails again


def test_on_the_next_try_an_image_that_fails_again_costs_only_itself(bench: Any) -> None:
    images = three(bench)
    engine, task = bench.engine(), bench.task(*images)
    bench.server.misbehave("crash")
    with pytest.raises(EngineCrashed):
        engine.run(task, lambda: None)
    bench.server.misbehave("crash")
    result = engine.run(replace(task, strikes=1), lambda: None)
    engine.close()
    assert len(findings(result)) == 2
    assert "not analysed: the engine failed on it, more than once" in " ".join(findings(result)[0].notes)


# --- as DICOM


def test_findings_heatmaps_and_reports_become_objects_about_their_images(bench: Any) -> None:
    images = three(bench)
    result = bench.run(*images, bulk=True, report=True)
    context = result_context(
        result.provenance,
        series_instance_uid=images[0].series_instance_uid,
        input_digest="d",
        rule="r",
        run="1",
        run_number=1,
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        time_zone="+0000",
        node_name="DICOM_NODE",
    )
    kinds = ("sr", "sc", "pdf")
    encoders = [encoder_class(kind)() for kind in kinds]
    made = encoded(result, bench.task(*images), context, encoders=encoders, kinds=kinds, heartbeat=lambda: None)
    modalities = [str(ds.Modality) for ds in made]
    assert modalities.count("OT") == 3 and modalities.count("DOC") == 3 and "SR" in modalities
    captures = [ds for ds in made if ds.Modality == "OT"]
    referred = sorted(str(ds.SourceImageSequence[0].ReferencedSOPInstanceUID) for ds in captures)
    assert referred == sorted(image.sop_instance_uid for image in images)


def test_the_report_of_the_engine_says_what_is_asked_and_what_comes_back(bench: Any) -> None:
    engine = bench.engine(bulk=True, report=True)
    told = dict(engine.report())
    engine.close()
    assert told["asked"] == "all images of a series at once"
    assert "PDF reports" in told["what comes back"] and "pseudonymised" in told["what leaves"]


def test_an_unfit_series_asks_nothing(bench: Any) -> None:
    image = bench.image(sop_class="CR", omit=("ViewPosition",))
    with pytest.raises(EngineRejected, match="the view is not given"):
        bench.run(image, bulk=True)
    assert bench.server.asked == [] and bench.notes == []
