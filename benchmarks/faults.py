"""What a probe of faults and attacks says of the running node, plain and over TLS, and of Orthanc beside it.

    python benchmarks/faults.py --script dicom_faults.py [--only slow,idle] [--systems ours,tls,orthanc]

The probe is a program of its own (`--list`, `--port`, `--aet`, `--pid`, `--storage`, `--tls`; a line of JSON for each
case with `case` and `verdict`). Exit status 1 when the node has a FAIL or a WARN.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from _bench_systems import Node, Orthanc, System, free_port, without_nodelay

CALLER = "FAULTS"
VERDICTS = ("PASS", "FAIL", "WARN", "INFO", "SKIP")
LIMIT_S = 1500


class ListedNode(Node):
    """dicom-node under an allow-list of one peer, which may ask for storage commitment."""

    name = "ours"

    def more_settings(self) -> dict[str, object]:
        """What is set beside the benchmark's own."""
        commitment = {"storage_commitment": True, "report_host": "127.0.0.1", "report_port": free_port()}
        return {"peers": {"faults": {"ae_title": CALLER, **commitment}}, "destinations": {}}

    def command(self) -> list[str]:
        """As a user starts it."""
        words = super().command()
        config = Path(words[-1])
        settings = json.loads(config.read_text(encoding="utf-8")) | self.more_settings()
        config.write_text(json.dumps(settings), encoding="utf-8")
        return words

    @property
    def watched_pid(self) -> int:
        """Of the process that has the associations."""
        return int(json.loads((self.folder / "data" / "run" / "receiver.json").read_text(encoding="utf-8"))["pid"])

    def options(self) -> list[str]:
        """Of the probe."""
        return ["--storage", str(self.folder / "data"), "--pid", str(self.watched_pid), "--calling", CALLER]


class TlsNode(ListedNode):
    """The same over TLS, with certificates on both sides."""

    name = "ours, TLS"

    def more_settings(self) -> dict[str, object]:
        """With a certificate that is its own authority."""
        certificate, key = str(self.folder / "node.pem"), str(self.folder / "node.key")
        words = [
            "req",
            "-x509",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=faults",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ]
        words += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", key, "-out", certificate]
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
        os.chmod(key, 0o600)
        return super().more_settings() | {"tls": {"certificate": certificate, "key": key, "ca": certificate}}

    def options(self) -> list[str]:
        """Of the probe."""
        certificate, key = str(self.folder / "node.pem"), str(self.folder / "node.key")
        return [*super().options(), "--tls", "--cafile", certificate, "--cert", certificate, "--key", key]


class OpenOrthanc(Orthanc):
    """Orthanc as it is shipped."""

    def options(self) -> list[str]:
        """Of the probe."""
        return ["--storage", str(self.folder), "--calling", CALLER]


SYSTEMS: dict[str, type[System]] = {"ours": ListedNode, "tls": TlsNode, "orthanc": OpenOrthanc}


def probed(system: System, script: Path, more: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Verdict and outcome of each case."""
    with system:
        options: list[str] = system.options()  # type: ignore[attr-defined]
        words = [sys.executable, str(script), "--port", str(system.port), "--aet", system.ae_title, *options, *more]
        ended = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, env=without_nodelay(), check=False
        )
    cases = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    found = {case["case"]: (case["verdict"], case.get("outcome", "")) for case in cases if "verdict" in case}
    if not found:
        raise SystemExit(f"{script} said nothing of {system.name}")
    return found


def table(results: dict[str, dict[str, tuple[str, str]]]) -> str:
    """A row for each group of cases: how many ended how, for each system."""
    groups = list(dict.fromkeys(case.split("_")[0] for found in results.values() for case in found))
    lines = [f"{'group':<10}" + "".join(f"{name:>30}" for name in results)]
    for group in [*groups, "all"]:
        row = f"{group:<10}"
        for found in results.values():
            counted = Counter(verdict for case, (verdict, _) in found.items() if group in ("all", case.split("_")[0]))
            row += f"{' '.join(f'{counted[verdict]} {verdict}' for verdict in VERDICTS if counted[verdict]):>30}"
        lines.append(row)
    return "\n".join(lines)


def main() -> int:
    """The table, then every case that is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--systems", default="ours,tls,orthanc")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    args = parser.parse_args()
    if not args.script.is_file():
        print(f"{args.script} is not there: set FAULTS_SCRIPT to the probe; only the cases of our own are run")
        return 0
    more = ["--only", args.only] if args.only else []
    results: dict[str, dict[str, tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for name in args.systems.split(","):
            if name == "orthanc" and not shutil.which("Orthanc"):
                print("Orthanc (Debian package orthanc) is not installed: no column of it")
                continue
            system = SYSTEMS[name](Path(scratch, name), 1)
            results[system.name] = probed(system, args.script.absolute(), more)
    print(table(results))
    bad = 0
    for name, found in results.items():
        for case, (verdict, outcome) in found.items():
            if name.startswith("ours") and verdict in ("FAIL", "WARN"):
                bad += 1
                print(f"{name}: {verdict} {case}: {outcome}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
