"""Coverage-guided fuzzing of every target in turn: `python tests/fuzz/run.py --minutes 10`, or `--runs 2000`.

Each target runs in a process of its own, forked from one that has everything loaded and instrumented. An input that
breaks a promise is left in FINDINGS/<target>/ and its traceback printed; what the fuzzer found worth keeping lies in
CORPUS/<target>/ and is begun with the next time. Exit status 1 when there was a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # the targets, and the tree they are of
with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stderr(nowhere),  # it names each module
    atheris.instrument_imports(include=["dicom_node"]),
    warnings.catch_warnings(),
):
    warnings.simplefilter("ignore")
    from fuzz_targets import TARGETS, Target

STOPPED_S = 30  # an input that takes longer is a finding
MEMORY_MB = 2048


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="in all, shared by the targets")
    parser.add_argument("--runs", type=int, default=0, help="inputs beside the seeds, fewer of slow targets")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--only", default="", help="names of targets, with commas between")
    parser.add_argument("--corpus", type=Path, help="folder of inputs worth keeping; default: none is kept")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"), help="where inputs that fail go")
    return parser.parse_args()


def _seed(target: Target, folder: Path) -> int:
    """Fill the folder; how many inputs there are."""
    named = os.environ.get("DICOM_NODE_CORPUS")
    folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds(Path(named) if named else None):
        if len(seed) <= target.longest:
            (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    kept = HERE / "regressions" / target.name
    for path in kept.iterdir() if kept.is_dir() else ():
        shutil.copy(path, folder)
    return len(os.listdir(folder))


def _kept(target: Target, findings: Path) -> Callable[[bytes], None]:
    """The target, which leaves what breaks it."""

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            findings.mkdir(parents=True, exist_ok=True)
            (findings / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    return run


def _fuzz(target: Target, options: list[str], corpus: Path, findings: Path, log: Path) -> None:
    """In a process of its own: never returns."""
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    warnings.simplefilter("ignore")
    code = 1
    try:
        atheris.Setup([sys.argv[0], *options, str(corpus)], _kept(target, findings), enable_python_coverage=True)
        atheris.Fuzz()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the target let out
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is ended here


def _told(log: str) -> str:
    """What libFuzzer's last line says: inputs, edges, inputs a second."""
    found = re.findall(r"^#(\d+)\s+\w+\s+cov: (\d+).*?exec/s: (\d+)", log, re.M)
    runs, edges, pace = found[-1] if found else ("0", "0", "0")
    return f"{runs:>9} runs {edges:>6} edges {pace:>6}/s"


def _one(target: Target, args: argparse.Namespace, seconds: float) -> bool:
    findings = (args.findings / target.name).absolute()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        corpus = (args.corpus / target.name).absolute() if args.corpus else Path(scratch, "corpus")
        seeds = _seed(target, corpus)
        options = [f"-artifact_prefix={findings}-", f"-max_len={target.longest}", f"-timeout={STOPPED_S}"]
        options += [f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1", "-len_control=0", "-verbosity=1"]
        options += [f"-seed={args.seed}"] if args.seed else []
        if args.runs:
            options.append(f"-atheris_runs={seeds + args.runs // target.cost}")
        else:
            options.append(f"-max_total_time={max(int(seconds), 1)}")
        log, started = Path(scratch, "log"), time.monotonic()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ["TMPDIR"] = tempfile.tempdir = scratch
            _fuzz(target, options, corpus, findings, log)
        _, status = os.waitpid(child, 0)
        text = log.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        outcome = "ok" if code == 0 else f"FINDING ({code}), see {findings}"
        print(f"{target.name:<13} {_told(text)} {time.monotonic() - started:>6.1f} s  {outcome}", flush=True)
        if code:
            print("\n".join(text.splitlines()[-60:]), flush=True)
    return code == 0


def main() -> int:
    """Every target that was asked for; 1 when one has a finding."""
    args = _arguments()
    wanted = [one for one in TARGETS if not args.only or one.name in args.only.split(",")]
    if not wanted or bool(args.minutes) == bool(args.runs):
        print(f"either --minutes or --runs, and targets of {', '.join(one.name for one in TARGETS)}", file=sys.stderr)
        return 2
    args.findings.mkdir(parents=True, exist_ok=True)
    good = [_one(target, args, args.minutes * 60 / len(wanted)) for target in wanted]
    print(f"{len(wanted)} targets, {good.count(False)} with a finding")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
