"""Pass a whole folder through the streaming feed on a Ray of a given object store; print what the store went through.

python stream_through.py FOLDER SIZE STORE_BYTES
"""

import json
import sys
import threading
import time

import ray
import torch
from ray._private.internal_api import node_stats

from meanet import data
from meanet.cluster import ray_cluster
from meanet.config import DataConfig
from meanet.data import StreamedTable
from meanet.feeds import Augmentation, Scaling, Share
from meanet.preprocessing import Preprocessing
from meanet.streaming import StreamingFeed


class Watch(threading.Thread):
    """The object store's use, every 50 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.spilled, self.done = 0, 0, threading.Event()

    def run(self) -> None:
        (node,) = ray.nodes()
        while not self.done.wait(0.05):
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            self.peak = max(self.peak, stats.store_stats.object_store_bytes_used)
            self.spilled = max(self.spilled, stats.store_stats.spilled_bytes_total)


def main() -> None:
    folder, size, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = DataConfig(source=f"folder:{folder}", feed="streaming", image_size=size, min_crop_area=0.5, flip=True)
    table = data.load(config)
    assert isinstance(table, StreamedTable)
    preprocessing = Preprocessing(size, size, 3, (0.5,) * 3, (0.25,) * 3, resize=True)
    with ray_cluster(None, object_store_bytes=store):
        watch = Watch()
        watch.start()
        feed = StreamingFeed(table, Augmentation(config), Scaling(preprocessing, torch.device("cpu"), True))
        rows, share = torch.arange(len(table.labels)), Share(0, 1, 32)
        started = time.monotonic()
        steps = feed.steps(rows, share)
        passed = feed.train(rows, share, (1, 2), steps)
        trained = [number.tolist() for number, images in passed if images.isfinite().all()]
        seconds = time.monotonic() - started
        evaluated = [row for number, _ in feed.evaluate(rows, 64) for row in number.tolist()]
        twice = [[number.tolist() for number, _ in feed.train(rows, share, (1, 2), 3)] for _ in range(2)]
        watch.done.set()
        watch.join()
    seen = [row for batch in trained for row in batch]
    print(
        json.dumps(
            {
                "decoded_bytes": table.num_bytes,
                "peak_bytes": watch.peak,
                "spilled_bytes": watch.spilled,
                "images_per_second": len(seen) / seconds,
                "steps": len(trained),
                "rows": sorted(seen),
                "evaluated_in_order": evaluated == rows.tolist(),
                "mixed": len({row // 256 for row in trained[0]}) > 1 or trained[0] != sorted(trained[0]),
                "repeatable": twice[0] == twice[1] and len(twice[0]) == 3,
            }
        )
    )


if __name__ == "__main__":
    main()
