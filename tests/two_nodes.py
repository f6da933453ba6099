"""Whether nodes can write a storage: two that are alike, where one then does not answer; then a third that has another
key. No test itself.

python tests/two_nodes.py URI KEY SECRET
"""

import os
import sys
import tempfile
import time

from ray.cluster_utils import Cluster

from meanet import nodes
from meanet.cluster import ray_cluster
from meanet.errors import UserError


def main() -> None:
    answers = sys.stdout  # what else is printed goes to standard error
    uri, key, secret = sys.argv[1:]
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    with tempfile.TemporaryDirectory(prefix="two-nodes-", ignore_cleanup_errors=True) as folder:
        # with a temp_dir, Cluster's address goes into /tmp/ray, which may not be there
        os.environ["RAY_TMPDIR"] = folder
        head = {**small, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**small)
            with ray_cluster(cluster.address):
                print(nodes.check_storage(uri), file=answers, flush=True)
                nodes._PATIENCE_S = 1.0
                try:
                    nodes._on_other_nodes(lambda: time.sleep(30))
                except UserError as error:
                    print(error, file=answers, flush=True)
                nodes._PATIENCE_S = 60.0
                cluster.add_node(**small, env_vars={"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret})
                try:
                    print(nodes.check_storage(uri), file=answers, flush=True)
                except UserError as error:
                    print(error, file=answers, flush=True)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
