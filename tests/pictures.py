"""Small sets of images on disk, as users have them."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def coloured(class_id: int, size: int, seed: int) -> Pixels:
    """(size, size, 3): a colour for the class, a gradient and some noise, so that a network can learn it."""
    generator = np.random.default_rng([class_id, seed])
    colour = np.array([(97 * class_id) % 256, (57 * class_id + 80) % 256, (173 * class_id + 160) % 256])
    ramp = np.linspace(-40, 40, size)[:, None, None] * (1 if class_id % 2 else -1)
    noise = generator.integers(-20, 21, (size // 4 + 1, size // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)[:size, :size]
    image: Pixels = np.clip(colour + ramp + noise, 0, 255).astype(np.uint8)
    return image


def encode(image: Pixels, kind: str = "PNG", mode: str | None = None) -> bytes:
    """The file's bytes, in another mode if asked."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return buffer.getvalue()


def image_folder(
    root: Path,
    num_classes: int,
    each: int,
    size: int,
    *,
    kind: str = "PNG",
    name_of: Callable[[int], str] = "class{}".format,
) -> Path:
    """CLASS/NNNN.png, as ImageFolder has it."""
    for class_id in range(num_classes):
        folder = root / name_of(class_id)
        folder.mkdir(parents=True)
        for number in range(each):
            name = f"{number:04d}.{'jpg' if kind == 'JPEG' else kind.lower()}"
            (folder / name).write_bytes(encode(coloured(class_id, size, number), kind))
    return root


def parquet(
    path: Path, rows: Sequence[tuple[bytes | None, int | None]], names: Sequence[str] | None, group: int = 16
) -> Path:
    """The hubs' layout: a struct of bytes and path, and an integer label."""
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("fine_label", pa.int64())],
        metadata={b"class_names": ",".join(names).encode()} if names else None,
    )
    images = [{"bytes": data, "path": None} for data, _ in rows]
    table = pa.table(
        [pa.array(images, schema.field(0).type), pa.array([label for _, label in rows], pa.int64())], schema=schema
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
