"""Who waits for work looks when a bell is rung, and a ring between the look and the waiting is not lost."""

import os
import threading
import time
from collections.abc import Callable

from dicom_node.bells import Bell, new_bell
from dicom_node.nudge import Nudge

WaitFor = Callable[[Callable[[], object], float, str], None]


def test_a_nudge_ends_the_wait_of_everybody_even_when_it_came_before_it() -> None:
    nudge = Nudge()
    seen, ended = nudge.count, []
    threads = [threading.Thread(target=lambda: (nudge.wait(seen, 30.0), ended.append(1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    nudge.give()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 3
    began = time.monotonic()
    nudge.wait(seen, 30.0)  # it came after `seen`
    assert time.monotonic() - began < 10
    nudge.wait(nudge.count, 0.01)  # none came since


def test_a_bell_is_heard_through_an_inherited_descriptor(wait_for: WaitFor) -> None:
    fd = new_bell()
    inherited, nudge = os.dup(fd), Nudge()
    hearing, ringing = Bell(fd), Bell(inherited)
    ringing.ring()  # before anybody listens
    hearing.answer(nudge.give)
    wait_for(lambda: nudge.count == 1, 10, "the ring before")
    ringing.ring()
    wait_for(lambda: nudge.count == 2, 10, "a ring")
    hearing.stop()
    Bell(-1).ring()
    for each in (fd, inherited):
        os.close(each)
    ringing.ring()  # whoever was to hear it is gone
