"""A replica that starts stands behind those that answer: its start takes seconds of a core, which would be theirs.

Linux keeps a niceness for each thread, and only who may raise a priority again (root, or RLIMIT_NICE) lowers it here.
"""

import os
import resource
from contextlib import suppress
from pathlib import Path

HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "serve_apps.priority.wait_behind"}
"""Of an actor's environment: Ray calls it in the actor's process before anything of ours is imported
(ray/_private/workers/default_worker.py; `worker_process_setup_hook` itself is a whole job's)."""
_BEHIND = 10
_THREADS = Path("/proc/self/task")
_before: list[int] = []


def wait_behind() -> None:
    """From now on, until `as_others`; the threads that follow, too."""
    if _THREADS.is_dir() and _may_come_back() and not _before:
        _before.append(os.getpriority(os.PRIO_PROCESS, 0))
        os.setpriority(os.PRIO_PROCESS, 0, min(19, _before[0] + _BEHIND))


def as_others() -> None:
    """All threads of this process as before."""
    if not _before:
        return
    own = _before.pop()
    for thread in os.listdir(_THREADS):
        with suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread), own)


def _may_come_back() -> bool:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20 - own
