"""Decoder processes: the same cells as here, and whatever a stream does to one of them, the node goes on."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

from dicom_node.clock import SystemClock
from dicom_node.config import JobSettings, NodeConfig
from dicom_node.decoder import decoded_planes
from dicom_node.decoder_link import DecoderLimits, Frames
from dicom_node.decoding import DecoderPool, close_decoders, decoders, use_decoders
from dicom_node.errors import EngineUnavailable, SeriesRejected
from dicom_node.model import StoredInstance
from dicom_node.pixels import displayed_radiograph, read_hounsfield, read_image
from dicom_node.process import Orders
from dicom_node.worker import Work

Stored = Callable[[Path], StoredInstance]
MakePool = Callable[..., DecoderPool]
Cells = npt.NDArray[Any]

J2K = uids.JPEG2000Lossless
COMPRESSED = (J2K, uids.JPEGLSLossless, uids.RLELossless, uids.DeflatedExplicitVRLittleEndian, uids.ExplicitVRBigEndian)


def cells_of(seed: int, shape: tuple[int, ...] = (48, 64)) -> Cells:
    return np.random.default_rng(seed).integers(0, 4096, shape).astype(np.uint16)


def write(path: Path, cells: Cells, syntax: str = J2K) -> Path:
    """An image, multi-frame where `cells` are (frames, rows, columns)."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uids.CTImageStorage, uids.generate_uid()
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "CT", 1, "MONOCHROME2"
    ds.Rows, ds.Columns = cells.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
    if cells.ndim == 3:
        ds.NumberOfFrames = len(cells)
    native = syntax in (uids.ExplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian, uids.ExplicitVRBigEndian)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = syntax if native else uids.ExplicitVRLittleEndian
    ds.PixelData = cells.astype(">u2" if syntax == uids.ExplicitVRBigEndian else "<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if not native:
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def work(path: Path, syntax: str = J2K, frames: tuple[int, ...] = (0,), shape: tuple[int, int] = (48, 64)) -> Frames:
    return Frames(
        path=str(path),
        syntax=syntax,
        name=uids.UID(syntax).name,
        frames=frames,
        shape=shape,
        dtype=np.dtype("<u2"),
    )


def one(pool: DecoderPool, wanted: Frames, heartbeat: Callable[[], None] | None = None) -> Cells:
    ((index, cells),) = pool.decode([wanted], heartbeat)
    assert index == 0
    return cells


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Pools that are closed at the end."""
    pools = []

    def make(size: int = 1, **limits: float) -> DecoderPool:
        pools.append(DecoderPool(size, DecoderLimits(**limits)))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """An image that can be decoded: `cells_of(1)`."""
    return write(tmp_path / "sound.dcm", cells_of(1))


@pytest.fixture
def stuck(tmp_path: Path) -> Path:
    """A file of which no byte ever comes."""
    os.mkfifo(tmp_path / "stuck.dcm")
    return tmp_path / "stuck.dcm"


# --- the same cells


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda syntax: str(syntax.name))
def test_a_series_comes_through_several_processes_as_it_was(syntax: uids.UID, tmp_path: Path, stored: Stored) -> None:
    slices = [cells_of(k) for k in range(9)]
    paths = [write(tmp_path / f"{k}.dcm", cells, syntax) for k, cells in enumerate(slices)]
    beats: list[None] = []
    close_decoders()
    use_decoders(2)
    volume = read_hounsfield([read_image(stored(path)) for path in paths], lambda: beats.append(None))
    assert len(decoders().pids) == 2
    assert len(beats) >= len(paths)
    np.testing.assert_array_equal(volume, np.stack(slices).astype(np.int16) - 1024)
    close_decoders()
    use_decoders(0)


def test_images_that_need_no_decoder_start_none(tmp_path: Path, stored: Stored) -> None:
    close_decoders()
    image = read_image(stored(write(tmp_path / "a.dcm", cells_of(1), uids.ExplicitVRLittleEndian)))
    read_hounsfield([image] * 3)
    displayed_radiograph(image)
    assert decoders().pids == []


def test_frames_of_one_image_are_decoded_in_one_request_and_by_several(tmp_path: Path, make_pool: MakePool) -> None:
    frames = cells_of(2, (7, 48, 64))
    path = write(tmp_path / "a.dcm", frames)
    wanted = [work(path, frames=(0, 1, 2)), work(path, frames=(4, 6)), work(path, frames=(3,))]
    found = dict(make_pool(2).decode(wanted))
    for index, request in enumerate(wanted):
        np.testing.assert_array_equal(found[index], frames[list(request.frames)])


def test_requests_of_different_sizes_follow_each_other_in_one_process(tmp_path: Path, make_pool: MakePool) -> None:
    pool = make_pool()
    for size in (64, 512, 16, 4200, 4200, 32):  # 4200: its memory file is not kept
        cells = np.tile(cells_of(size, (8, 8)), (size // 8, size // 8))
        path = write(tmp_path / "a.dcm", cells, uids.ExplicitVRBigEndian)
        found = one(pool, work(path, uids.ExplicitVRBigEndian, shape=cells.shape))
        np.testing.assert_array_equal(found[0], cells)
        for pid in (*pool.pids, os.getpid()):
            assert cell_bytes(pid) <= 32 << 20
    assert len(pool.pids) == 1


def cell_bytes(pid: int) -> int:
    """What a process has mapped of memory files for cells."""
    lines = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "dicom-node-cells" in line]
    ends = [line.split()[0].split("-") for line in lines]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)


def test_several_threads_decode_at_once(tmp_path: Path, make_pool: MakePool) -> None:
    pool = make_pool(2)
    paths = [write(tmp_path / f"{k}.dcm", cells_of(k)) for k in range(10)]
    right: list[bool] = []

    def read() -> None:
        found = dict(pool.decode([work(path) for path in paths]))
        right.append(all(np.array_equal(found[k][0], cells_of(k)) for k in range(len(paths))))

    threads = [threading.Thread(target=read) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert right == [True] * 5
    assert len(pool.pids) == 2


def test_a_short_series_is_not_held_up_by_a_long_one(sound: Path, make_pool: MakePool) -> None:
    pool = make_pool(1)
    done = threading.Event()

    def short() -> None:
        one(pool, work(sound))
        done.set()

    thread = threading.Thread(target=short)
    left = 500
    for _ in pool.decode([work(sound)] * left):
        if left == 500:
            thread.start()
        left -= 1
        if done.is_set():
            break
    thread.join(timeout=60)
    assert left > 100


# --- streams that are not what they seem


def test_what_cannot_be_decoded_is_refused_with_its_reason(tmp_path: Path, sound: Path, make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(SeriesRejected, match="shape"):
        one(pool, work(sound, shape=(64, 48)))
    with pytest.raises(SeriesRejected, match=r"JPEG 2000.*cannot be decoded \(FileNotFoundError\)"):
        one(pool, work(tmp_path / "none.dcm"))
    with pytest.raises(SeriesRejected, match=r"cannot be decoded|fewer frames"):
        one(pool, work(sound, frames=(3,)))
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


def test_a_stream_that_claims_to_be_huge_gets_no_more_than_the_limit(
    tmp_path: Path, sound: Path, make_pool: MakePool
) -> None:
    pool = make_pool(memory_bytes=512 << 20)
    one(pool, work(sound))
    content = bytearray(sound.read_bytes())
    size = content.index(b"\xff\x4f\xff\x51") + 8  # SOC, SIZ, Lsiz, Rsiz: then Xsiz, Ysiz (ISO 15444-1 A.5.1)
    for side in (13_000, 60_000, 2**31 - 1):
        struct.pack_into(">II", content, size, side, side)
        struct.pack_into(">II", content, size + 16, side, side)  # one tile
        huge = tmp_path / "huge.dcm"
        huge.write_bytes(content)
        with pytest.raises(SeriesRejected, match=r"JPEG 2000.*cannot be decoded"):
            one(pool, work(huge))
    peak = Path(f"/proc/{pool.pids[0]}/status").read_text().split("VmPeak:")[1].split()[0]
    assert int(peak) * 1024 <= (512 << 20) + 8 * 48 * 64 * 2
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


def test_a_data_set_that_inflates_without_end_gets_no_more_than_the_limit(
    tmp_path: Path, sound: Path, make_pool: MakePool
) -> None:
    syntax = uids.DeflatedExplicitVRLittleEndian
    path = write(tmp_path / "a.dcm", cells_of(1), syntax)
    content = path.read_bytes()
    length = 132 + 12 + struct.unpack_from("<I", content, 140)[0]
    deflater = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    with path.open("wb") as file:
        file.write(content[:length])
        for _ in range(24):
            file.write(deflater.compress(bytes(1 << 24)))
        file.write(deflater.flush())
    pool = make_pool(memory_bytes=256 << 20)
    with pytest.raises(SeriesRejected, match="MemoryError"):
        one(pool, work(path, syntax))
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


def test_a_stream_that_takes_too_long_ends_its_decoder_and_is_refused(
    tmp_path: Path, sound: Path, make_pool: MakePool
) -> None:
    pool = make_pool(cpu_s=0.5)
    endless = tmp_path / "endless.dcm"
    content = sound.read_bytes()
    endless.write_bytes(content[: 132 + 12 + struct.unpack_from("<I", content, 140)[0]])
    os.truncate(endless, 1 << 30)  # zeros: empty elements, one after another, for minutes
    one(pool, work(sound))
    (pid,) = pool.pids
    with pytest.raises(SeriesRejected, match=r"JPEG 2000.*the decoder was not done after 0\.5"):
        one(pool, work(endless))
    assert not psutil.pid_exists(pid)
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


# --- processes that die or hang


def ended(pool: DecoderPool, by: signal.Signals) -> Callable[[], None]:
    """A heartbeat that ends the decoders that are at work, each once it has started."""

    def beat() -> None:
        for decoder in pool._all:
            if decoder._ready:
                decoder.process.send_signal(by)

    return beat


def test_a_decoder_that_is_killed_once_costs_nothing(sound: Path, stuck: Path, make_pool: MakePool) -> None:
    pool = make_pool()
    one(pool, work(sound))
    first = pool.pids

    def kill() -> None:
        if pool.pids == first:
            os.replace(sound, stuck)
            os.kill(first[0], signal.SIGKILL)

    np.testing.assert_array_equal(one(pool, work(stuck), kill)[0], cells_of(1))
    assert first != pool.pids


def test_an_image_that_kills_two_decoders_is_refused_and_the_pool_heals(
    sound: Path, stuck: Path, make_pool: MakePool
) -> None:
    pool = make_pool(2)
    with pytest.raises(SeriesRejected, match=r"JPEG 2000.*cannot be decoded: the decoder died \(Segmentation fault\)"):
        list(pool.decode([work(stuck), work(sound)], ended(pool, signal.SIGSEGV)))
    with pytest.raises(EngineUnavailable, match=r"decoder processes do not live: one died \(Killed\)"):
        list(pool.decode([work(stuck), work(sound)], ended(pool, signal.SIGKILL)))  # as by a system out of memory
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


def test_large_images_that_cannot_be_decoded_leave_their_decoders_fit(
    tmp_path: Path, sound: Path, make_pool: MakePool
) -> None:
    pool = make_pool()
    large = tmp_path / "large.dcm"
    large.write_bytes(sound.read_bytes()[:-40])
    for _ in range(2):
        with pytest.raises(SeriesRejected):
            one(pool, work(large, shape=(4200, 4200)))
        np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


def test_decoders_live_with_the_limits_of_the_node(sound: Path) -> None:
    code = (
        "import resource, sys, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from dicom_node.decoder_link import Frames\n"
        "from dicom_node.decoding import DecoderPool\n"
        "pool = DecoderPool(1)\n"
        f"given = dict(path=sys.argv[1], syntax={str(J2K)!r}, name='J', frames=(0,), shape=(48, 64))\n"
        "asked = Frames(**given, dtype=np.dtype('<u2'))\n"
        "print(len(list(pool.decode([asked]))))\n"
        "pool.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sound)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_decoder_that_hangs_is_ended_and_its_image_refused(sound: Path, stuck: Path, make_pool: MakePool) -> None:
    pool = make_pool(cpu_s=0.05, wall_factor=5.0)
    beats: list[float] = []
    with pytest.raises(SeriesRejected, match="the decoder gave no answer in 5 times its time"):
        one(pool, work(stuck), lambda: beats.append(time.monotonic()))
    assert beats
    assert pool.pids == []
    np.testing.assert_array_equal(one(make_pool(), work(sound))[0], cells_of(1))


def test_free_decoders_that_were_killed_are_replaced(sound: Path, make_pool: MakePool) -> None:
    pool = make_pool(2)
    list(pool.decode([work(sound)] * 8))
    pids = pool.pids
    assert len(pids) == 2
    for decoder in pool._all:
        os.kill(decoder.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, decoder.process.pid, os.WEXITED | os.WNOWAIT)
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))  # and neither counts as a death by it
    assert len(pool.pids) == 1
    assert not set(pool.pids) & set(pids)


def test_who_leaves_early_leaves_nothing_behind_for_the_next(tmp_path: Path, sound: Path, make_pool: MakePool) -> None:
    pool = make_pool(2)
    others = [work(write(tmp_path / f"{k}.dcm", cells_of(10 + k))) for k in range(6)]

    def stop() -> None:
        raise EngineUnavailable("the node stops")

    with pytest.raises(EngineUnavailable, match="the node stops"):
        list(pool.decode(others, stop))  # the first processes start yet: it beats
    for index, cells in pool.decode([work(sound)] * 4):
        assert np.array_equal(cells[0], cells_of(1)), index
    assert len(pool.pids) <= 2


def test_a_process_that_cannot_start_is_not_the_images_fault(
    sound: Path, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        with pytest.raises(EngineUnavailable, match=r"does not start: it ended \(exit status 1\)"):
            one(pool, work(sound))
        broken.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(EngineUnavailable, match="cannot be started"):
            one(pool, work(sound))
    np.testing.assert_array_equal(one(pool, work(sound))[0], cells_of(1))


# --- the end


def test_closing_ends_every_process_and_tells_who_waits(sound: Path, stuck: Path, make_pool: MakePool) -> None:
    pool = make_pool(2)
    list(pool.decode([work(sound)] * 8))
    pids, told = pool.pids, []
    beaten = threading.Event()

    def wait_for_ever() -> None:
        with pytest.raises(EngineUnavailable, match="closed"):
            one(pool, work(stuck), beaten.set)
        told.append(True)

    thread = threading.Thread(target=wait_for_ever)
    thread.start()
    assert beaten.wait(30)
    pool.close()
    thread.join(timeout=30)
    assert told == [True]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(EngineUnavailable, match="closed"):
        one(pool, work(sound))


def test_the_work_process_has_as_many_as_it_is_told_and_ends_them(tmp_path: Path, sound: Path) -> None:
    close_decoders()
    (tmp_path / "rules").mkdir()
    config = NodeConfig(data_dir=tmp_path, rules_dir=tmp_path / "rules", jobs=JobSettings(workers=0, decoders=3))
    part = Work(Orders(config=config, supervisor_pid=os.getpid()), SystemClock())
    try:
        list(decoders().decode([work(sound)] * 12))
        pids = decoders().pids
        assert len(pids) == 3
    finally:
        part.stop()
        use_decoders(0)
    assert not any(psutil.pid_exists(pid) for pid in pids)


_ASKER = """
import os, sys, numpy as np
from dicom_node.decoder_link import Frames
from dicom_node.decoding import decoders
def work(path):
    return Frames(path=path, syntax=sys.argv[3], name="", frames=(0,), shape=(48, 64), dtype=np.dtype("<u2"))
list(decoders().decode([work(sys.argv[1])] * 8))
print(*decoders().pids, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_no_decoder_outlives_the_process_that_asks(how: str, sound: Path) -> None:
    asker = subprocess.run(
        [sys.executable, "-c", _ASKER, str(sound), how, J2K], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert asker.returncode == (-signal.SIGKILL if how == "killed" else 0)
    pids = [int(word) for word in asker.stdout.split()]
    assert pids
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "a decoder process is left"
        time.sleep(0.02)


def test_a_decoder_asks_for_nothing_but_what_it_needs(sound: Path, make_pool: MakePool) -> None:
    pool = make_pool(memory_bytes=1 << 30)
    one(pool, work(sound))
    process = psutil.Process(pool.pids[0])
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)  # it writes no file
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_AS)[0] == (1 << 30) + 8 * 48 * 64 * 2
    assert process.num_threads() == 1
    assert process.net_connections("inet") == []


def test_the_planes_of_an_image_are_read_one_by_one(tmp_path: Path) -> None:
    frames = cells_of(2, (4, 48, 64))
    path = write(tmp_path / "a.dcm", frames, uids.RLELossless)
    planes = decoded_planes(str(path), uids.RLELossless, [1, 3], (48, 64), np.dtype("<u2"))
    np.testing.assert_array_equal(next(planes), frames[1])
    np.testing.assert_array_equal(next(planes), frames[3])
