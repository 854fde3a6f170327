"""Every corpus file through the real line: what is storable comes back by C-GET with the same data set, byte for byte;
of the rest the answer stands in a table."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dicom_node.config import DeliverySettings
from dicom_node.dimse.contexts import ProposedContext
from dicom_node.dimse.files import get_study, instance_of_file, send_files
from dicom_node.errors import InvalidInstance
from dicom_node.model import Destination, StoredInstance

SETTINGS = DeliverySettings(connect_timeout_s=5.0, response_timeout_s=30.0)

CAPTURES = ("echo", "find", "get", "store")
BROKEN_META = (
    *("TC0377_no_preamble", "TC0381_preamble_127", "TC0385_dicm_offset0", "TC0389_dicm_offset256"),
    *("TC0393_meta_glen_one", "TC0397_meta_glen_huge"),
)
NO_META = ("ExplVR_BigEndNoMeta", "ExplVR_LitEndNoMeta", "meta_missing_tsyntax", "no_meta", "rtstruct")
NO_UIDS = ("UN_sequence", "empty_charset_LEI", "nested_priv_SQ", "no_meta_group_length", "priv_SQ")
DIRECTORIES = (
    *("DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-empty.dcm", "DICOMDIR-implicit", "DICOMDIR-nooffset"),
    *("DICOMDIR-nopatient", "DICOMDIR-reordered", "TINY_ALPHA/DICOMDIR"),
)
FUZZ = "pwnlabmx+dicom-fuzzing-corpus/fuzz_corpus_v3"
PYDICOM = "pydicom+pydicom/src/pydicom/data"
DATA = "pydicom+pydicom-data/data_store/data"
WIRE = "profuzzbench+profuzzbench"

# Answered 0xC000, and why
REFUSED = {
    "sequences nested deeper than 64": {f"{FUZZ}/cat03_sequence_nesting/TC0265_depth_100.dcm"},
    "delimiters missing or astray": {
        f"{FUZZ}/cat03_sequence_nesting/TC0277_missing_delim.dcm",
        f"{FUZZ}/cat06_private_tags/TC0357_stray_item_tag.dcm",
        f"{FUZZ}/cat06_private_tags/TC0361_stray_seq_delim.dcm",
    },
    "a length that reaches past the end": {
        f"{FUZZ}/cat08_string_encoding/TC0405_latin1_utf8_payload.dcm",
        f"{FUZZ}/cat09_logic_bombs/TC0445_duplicate_tags.dcm",
        f"{DATA}/emri_small_jpeg_2k_lossless_too_short.dcm",
        f"{PYDICOM}/test_files/MR_truncated.dcm",
        f"{PYDICOM}/test_files/rtplan_truncated.dcm",
    },
    "a UID that is none": {
        f"{FUZZ}/cat09_logic_bombs/TC0457_uid_uid_65chars_over.dcm",
        f"{FUZZ}/cat09_logic_bombs/TC0461_uid_uid_leading_dot.dcm",
        f"{FUZZ}/cat09_logic_bombs/TC0465_uid_uid_all_dots.dcm",
    },
    "no Study or Series Instance UID": {
        *(f"{DATA}/{name}.dcm" for name in ("JLSL_08_07_0_1F", "JLSL_16_15_1_1F")),
        *(
            f"{PYDICOM}/palettes/{name}.dcm"
            for name in ("fall", "hotiron", "hotmetalblue", "pet", "pet20step", "spring", "summer", "winter")
        ),
        f"{PYDICOM}/test_files/JPEGLSNearLossless_08.dcm",
        f"{PYDICOM}/test_files/JPEGLSNearLossless_16.dcm",
        f"{PYDICOM}/test_files/SC_rgb_jls_lossy_line.dcm",
        f"{PYDICOM}/test_files/SC_rgb_jls_lossy_sample.dcm",
    },
    "another transfer syntax than it says": {f"{PYDICOM}/test_files/SC_rgb_jpeg.dcm"},
}
# Never on the wire, and why
NOT_SENT = {
    "no readable DICOM file": {
        *(f"{WIRE}/in-dicom/dicom_{name}.raw" for name in CAPTURES),
        *(f"{WIRE}/in-dicom-pcap/dicom_{name}.pcap" for name in CAPTURES),
        f"{FUZZ}/cat02_vr_mismatch/TC0233_rows_US_as_UL.dcm",
        f"{FUZZ}/cat05_transfer_syntax/TC0345_deflate_corrupt.dcm",
        *(f"{FUZZ}/cat07_file_meta/{name}.dcm" for name in BROKEN_META),
        f"{FUZZ}/cat09_logic_bombs/TC0469_group_len_zero.dcm",
        *(f"{DATA}/{name}.dcm" for name in ("JLSL_RGB_ILV0", "JLSL_RGB_ILV1", "JLSL_RGB_ILV2", "JLSN_RGB_ILV0")),
        *(f"{PYDICOM}/test_files/{name}.dcm" for name in NO_META),
    },
    "transfer syntax 999.888.777.INVALID cannot be decoded here": {f"{FUZZ}/cat07_file_meta/TC0401_invalid_ts.dcm"},
    "the file has no SOP Class or Instance UID (a DICOMDIR?)": {
        *(f"{PYDICOM}/charset_files/{name}.dcm" for name in ("chrSQEncoding", "chrSQEncoding1")),
        *(f"{PYDICOM}/test_files/{name}.dcm" for name in NO_UIDS),
        *(f"{PYDICOM}/test_files/dicomdirtests/{name}" for name in DIRECTORIES),
    },
}


def test_every_storable_file_comes_back_byte_for_byte(
    serve: Callable[..., Any], corpus: Path, tmp_path: Path, data_set_bytes: Callable[[Path], bytes]
) -> None:
    files = sorted(path for path in corpus.rglob("*") if path.is_file() and path.name != "MANIFEST.csv")
    instances = {path: instance for path in files if (instance := readable(path)) is not None}
    not_sent: dict[str, set[str]] = collections.defaultdict(set)
    refused: set[str] = set()
    kept: list[StoredInstance] = []
    different: list[str] = []
    stored = 0

    def note(path: Path, status: int | None, error: str) -> None:
        name = path.relative_to(corpus).as_posix()
        if status is None:
            not_sent[error].add(name)
        elif status:
            assert status == 0xC000, name
            refused.add(name)
        else:
            kept.append(instances[path])

    for number, paths in enumerate(in_rounds(files, instances)):
        node = serve(unknown_sop_classes=True)
        peer = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=node.port)
        kept.clear()
        send_files(paths, peer, note, settings=SETTINGS, calling_ae_title="TEST")
        different += fetch_and_compare(peer, kept, tmp_path / str(number), data_set_bytes)
        stored += len(kept)
        node.server.stop(2.0)
    assert different == []
    assert dict(not_sent) == NOT_SENT
    assert refused == set().union(*REFUSED.values())
    assert stored > 400


def fetch_and_compare(
    peer: Destination, kept: list[StoredInstance], folder: Path, data_set_bytes: Callable[[Path], bytes]
) -> list[str]:
    """Fetch everything, each in its own syntax; the paths of those that come back otherwise or not at all."""
    groups: dict[tuple[str, str], list[StoredInstance]] = collections.defaultdict(list)
    for instance in kept:
        groups[instance.sop_class_uid, instance.transfer_syntax_uid].append(instance)
    kinds = list(groups)
    for start in range(0, len(kinds), 100):
        contexts = [
            ProposedContext(abstract_syntax=uid, transfer_syntaxes=(syntax,), as_scp=True)
            for uid, syntax in kinds[start : start + 100]
        ]
        studies = {item.study_instance_uid.strip() for item in kept}
        get_study(
            *(peer, "\\".join(sorted(studies)), folder),
            settings=SETTINGS,
            calling_ae_title="TEST",
            storage=contexts,
        )
    wrong = []
    for instance in kept:
        got = folder / f"{instance.sop_instance_uid.strip()}.dcm"
        if not got.exists() or data_set_bytes(got) != data_set_bytes(Path(instance.path)):
            wrong.append(instance.path)
    return wrong


def readable(path: Path) -> StoredInstance | None:
    """The file as an instance, None when it is none."""
    try:
        return instance_of_file(path)
    except InvalidInstance:
        return None


def in_rounds(files: list[Path], instances: dict[Path, StoredInstance]) -> list[list[Path]]:
    """All files, so that no SOP Instance UID occurs twice in a round."""
    rounds: list[list[Path]] = []
    seen: collections.Counter[str] = collections.Counter()
    for path in files:
        uid = instances[path].sop_instance_uid.strip() if path in instances else str(path)
        number, seen[uid] = seen[uid], seen[uid] + 1
        rounds += [[]] * (number >= len(rounds))
        rounds[number] = [*rounds[number], path]
    return rounds
