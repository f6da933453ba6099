"""An application on a local Ray of eight logical CPUs, for tests that change it while it runs: not a test itself.

    python tests/live_server.py READY_FILE ARGS_JSON

Ends when its standard input does; a line `kill DEPLOYMENT` kills that deployment's replicas.
"""

import sys
from pathlib import Path

import ray

from meanet.cluster import ray_cluster
from serve_apps.__main__ import Flags, deployed, ingress_of
from serve_apps.graph import AppArgs


def kill(deployment: str) -> int:
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    found = [name for name in names if f"#{deployment}#" in name]
    for name in found:
        ray.kill(ray.get_actor(name, namespace="serve"))
    return len(found)


def main() -> None:
    answers = sys.stdout  # what else is printed goes to standard error
    ready, args = Path(sys.argv[1]), AppArgs.model_validate_json(sys.argv[2])
    flags = Flags(port=0)
    with ingress_of(flags), ray_cluster(None, num_cpus=8), deployed(flags, args) as url:
        part = ready.with_suffix(".part")
        part.write_text(url)
        part.rename(ready)
        for line in sys.stdin:
            print(kill(line.split()[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
