"""The system's clocks behind `interfaces.Clock`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from dicom_node.model import BootTime


@lru_cache(maxsize=1)
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class SystemClock:
    """CLOCK_BOOTTIME with the kernel's boot id: monotonic, the same in every process, counts through suspend."""

    def boot(self) -> BootTime:
        """Now on the boot clock."""
        return BootTime(boot_id=_boot_id(), seconds=time.clock_gettime(time.CLOCK_BOOTTIME))

    def wall(self) -> datetime:
        """Now, aware, UTC."""
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
