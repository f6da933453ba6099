"""Pass a whole folder through the streaming feed on a Ray of a given object store; print what the store went through.

python stream_through.py FOLDER SIZE STORE_BYTES
"""

import dataclasses
import json
import resource
import sys
import threading
import time

import ray
import torch
from ray._private.internal_api import node_stats

from meanet import data, recipes
from meanet.cluster import ray_cluster
from meanet.config import DataConfig
from meanet.data import StreamedTable
from meanet.feeds import Augmentation, Scaling, Share
from meanet.loop import SingleProcess
from meanet.preprocessing import Preprocessing
from meanet.streaming import StreamingFeed, streaming_feed
from meanet.training import Trainer


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


def train_a_little(table: StreamedTable, data_config: DataConfig) -> dict[str, float]:
    """Three steps a phase of MobileNetV2 B on this set; the loss of each phase."""
    recipe = recipes.imagenet_mobilenetv2_b()
    phases = {
        name: dataclasses.replace(getattr(recipe, name), epochs=1, max_steps=3, batch_size=size)
        for name, size in (("main", 8), ("extension", 8), ("cloud", 4))
    }
    data_config = dataclasses.replace(data_config, validation_fraction=0.02, test_fraction=0.02)
    recipe = dataclasses.replace(recipe, data=data_config, **phases)  # type: ignore[arg-type]
    splits = data.divide(table, data_config, seed=0)
    history = Trainer(recipe, splits, SingleProcess(), make_feed=streaming_feed).run().history
    return {row["phase"]: row["loss"] for row in history}


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
        parts = [
            [row for number, _ in feed.train(rows, Share(rank, 2, 32), (1, 2), 4) for row in number.tolist()]
            for rank in range(2)
        ]
        twice = [[number.tolist() for number, _ in feed.train(rows, share, (1, 2), 3)] for _ in range(2)]
        losses = train_a_little(table, config)
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
                "parts": parts,
                "losses": losses,
                "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "repeatable": twice[0] == twice[1] and len(twice[0]) == 3,
            }
        )
    )


if __name__ == "__main__":
    main()
