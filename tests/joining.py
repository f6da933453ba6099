"""Commands that join a cluster and leave it: their statuses, what their logs say of it, and what the cluster has free
once they are gone. No test itself.

python tests/joining.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from meanet.cluster import ray_cluster

_COMMAND = """
import sys
import ray
from meanet.cluster import ray_cluster
from meanet.stopping import leave_after

class One:
    def answer(self):
        return 1

def main():
    answers = sys.stdout
    with ray_cluster(sys.argv[1]):
        actors = [ray.remote(One).options(num_cpus=1).remote() for _ in range(2)]
        print(ray.get([actor.answer.remote() for actor in actors]), file=answers)
        sys.exit(3)

leave_after(main)
"""


def main() -> None:
    answers = sys.stdout  # what else is printed goes to standard error
    with tempfile.TemporaryDirectory(prefix="joining-", ignore_cleanup_errors=True) as folder:
        # with a temp_dir, Cluster's address goes into /tmp/ray, which may not be there
        os.environ["RAY_TMPDIR"] = folder
        head = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):  # the second needs the CPUs of the first one
                done = subprocess.run(
                    [sys.executable, "-c", _COMMAND, cluster.address], stdout=subprocess.PIPE, text=True, check=False
                )
                print(done.returncode, done.stdout.strip(), file=answers, flush=True)
            logs = [path.read_text() for path in Path(folder).rglob("session_2*/logs/python-core-driver-*.log")]
            print("taken apart", sum("Destructing" in log for log in logs), "of", len(logs), file=answers)
            with ray_cluster(cluster.address):
                deadline = time.monotonic() + 30
                while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
                    time.sleep(0.2)
                print("free", ray.available_resources().get("CPU"), file=answers, flush=True)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
