"""A loop over `predict` and nothing else: `python -m benchmarks.serving_peers.bare BODIES SECONDS BATCH [cloud]`.

Prints images, wall seconds and CPU seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

from benchmarks.serving_peers.predict import Cloud, Edge, unpack


def main() -> None:
    """Command-line entry."""
    folder, bodies = Path(os.environ["SERVED_FOLDER"]), unpack(Path(sys.argv[1]).read_bytes())
    seconds, batch = float(sys.argv[2]), int(sys.argv[3])
    edge = Edge(folder, Cloud(folder).classify if sys.argv[4:] == ["cloud"] else None)
    batches = [bodies[start : start + batch] for start in range(0, len(bodies), batch)]
    for one in batches[:20]:
        edge.predict(one)
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        for one in batches:
            edge.predict(one)
            count += len(one)
    wall, spent = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"images": count, "seconds": wall, "cpu": spent}))


if __name__ == "__main__":
    main()
