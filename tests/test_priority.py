"""A process that starts stands behind others, and afterwards does not."""

import json
import os
import subprocess
import sys

import pytest

_CODE = """
import json, os, threading, time
from serve_apps import priority

def all_of_it():
    return sorted(os.getpriority(os.PRIO_PROCESS, int(one)) for one in os.listdir("/proc/self/task"))

before = os.getpriority(os.PRIO_PROCESS, 0)
priority.as_others()  # of one that never stood behind: nothing happens
priority.wait_behind()
priority.wait_behind()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
behind = all_of_it()
priority.as_others()
print(json.dumps([before, behind, all_of_it()]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="niceness of a thread is Linux's")
def test_all_threads_stand_behind_and_come_back_or_none_do() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True, check=True)
    before, behind, after = json.loads(ran.stdout)
    assert set(after) == {before}
    assert set(behind) == ({min(19, before + 10)} if os.geteuid() == 0 else {before}), "who may not come back stays"
    assert len(behind) >= 2
