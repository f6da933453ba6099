"""What strangers send: images and requests that are damaged, huge, dear to decode or of another kind. Seeded.

Shape letters: H height, W width, C channels.
"""

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pyarrow as pa
from PIL import Image

Generator = np.random.Generator
Shape = tuple[int, int, int]
"""(H, W, C)."""


@dataclass(frozen=True)
class Hostile:
    """One request."""

    kind: str
    path: str
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    method: str = "POST"


def file_of(shape: Shape, kind: str, generator: Generator, mode: str | None = None, **options: object) -> bytes:
    """A sound PNG or JPEG of random pixels."""
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    picture = Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG's chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(shape: Shape, before: bytes = b"", data: bytes | None = None) -> bytes:
    """A grey or colour PNG of zeros, with chunks before its pixels."""
    height, width, channels = shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    data = zlib.compress(bytes((1 + width * channels) * height)) if data is None else data
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@cache
def zeros(megabytes: int) -> bytes:
    """So many zero bytes, deflated a thousand to one."""
    return zlib.compress(bytes(megabytes * 2**20), 9)


def damaged(body: bytes, generator: Generator) -> bytes:
    """Cut short, or with bytes changed, left out, doubled or put in."""
    changed = bytearray(body)
    way = generator.integers(5)
    if way == 0:
        return body[: generator.integers(len(body))]
    for _ in range(generator.integers(1, 9)):
        place = int(generator.integers(len(changed)))
        if way == 1:
            changed[place] = generator.integers(256)
        elif way == 2:
            changed[place] ^= 1 << int(generator.integers(8))
        elif way == 3:
            del changed[place : place + int(generator.integers(1, 9))]
        else:
            changed[place:place] = changed[place : place + int(generator.integers(1, 99))] or b"\xff"
        if not changed:
            break
    return bytes(changed)


def rearranged(body: bytes, generator: Generator) -> bytes:
    """A PNG whose chunks are damaged, doubled, left out or swapped, under right checksums."""
    parts, place = list[tuple[bytes, bytes]](), 8
    while place < len(body):
        size = int.from_bytes(body[place : place + 4])
        parts.append((body[place + 4 : place + 8], body[place + 8 : place + 8 + size]))
        place += 12 + size
    for _ in range(generator.integers(1, 4)):
        one, way = int(generator.integers(len(parts))), generator.integers(4)
        if way == 0 and parts[one][1]:
            parts[one] = parts[one][0], damaged(parts[one][1], generator)
        elif way == 1:
            parts.insert(one, parts[int(generator.integers(len(parts)))])
        elif way == 2 and len(parts) > 1:
            del parts[one]
        else:
            other = int(generator.integers(1, len(parts) + 1)) % len(parts)  # the header stays first, as a rule
            parts[one], parts[other] = parts[other], parts[one]
    return body[:8] + b"".join(chunk(*part) for part in parts)


def scans(shape: Shape, count: int, generator: Generator) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    body = file_of(shape, "JPEG", generator, progressive=True)
    last = body[body.rfind(b"\xff\xda") : -2]
    return body[:-2] + last * count + b"\xff\xd9"


def segments(shape: Shape, count: int, generator: Generator) -> bytes:
    """A JPEG with many comments, or many copies of its tables."""
    body = file_of(shape, "JPEG", generator)
    table = body.find(b"\xff\xdb")
    size = 2 + int.from_bytes(body[table + 2 : table + 4])
    extra = b"\xff\xfe\0\3x" if generator.integers(2) else body[table : table + size]
    return body[:2] + extra * count + body[2:]


def application(shape: Shape, generator: Generator) -> bytes:
    """A JPEG with a thumbnail, several pictures or a profile that are none."""
    marker, head = [
        (b"\xe1", b"Exif\0\0"),
        (b"\xe2", b"MPF\0"),
        (b"\xe2", b"ICC_PROFILE\0"),
        (b"\xed", b"Photoshop 3.0\0"),
    ][int(generator.integers(4))]
    content = (
        head + (b"II*\0\x08\0\0\0" if generator.integers(2) else b"") + generator.bytes(int(generator.integers(2000)))
    )
    body = file_of(shape, "JPEG", generator)
    return body[:2] + b"\xff" + marker + struct.pack(">H", len(content) + 2) + content + body[2:]


_TEXTS = (
    b"",
    b"http://127.0.0.1:8265/api/version",
    b"file:///etc/passwd",
    b"/etc/passwd",
    b"s3://bucket/image.png",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) run",
    b"%PDF-1.7",
    b"PK\x03\x04",
    b"GIF89a\xff\xff\xff\xff\0\0\0",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"\xff\xd8" + b"\xff" * 100_000,
    b"\xff\xd8\xff\xda\0\2" + b"\xff\0" * 200_000,
)
_MODES = ("1", "P", "RGBA", "LA", "CMYK", "I;16", "L", "RGB")

Maker = Callable[[Shape, Generator], bytes]


def _bomb(shape: Shape, generator: Generator) -> bytes:
    side = int(2 ** generator.uniform(13, 31))
    return png(shape).replace(struct.pack(">II", shape[1], shape[0]), struct.pack(">II", side, side))


def _wide_jpeg(shape: Shape, generator: Generator) -> bytes:
    body = bytearray(file_of(shape, "JPEG", generator))
    frame = body.find(b"\xff\xc0")
    body[frame + 5 : frame + 9] = struct.pack(">HH", *(int(side) for side in 2 ** generator.uniform(0, 15, 2)))
    return bytes(body)


def _inflating(shape: Shape, generator: Generator) -> bytes:
    name, head = [(b"iCCP", b"p\0\0"), (b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")][int(generator.integers(3))]
    return png(shape, chunk(name, head + zeros(64)) * int(generator.integers(1, 4)))


def _chunks(shape: Shape, generator: Generator) -> bytes:
    name = [b"tEXt", b"IDAT", b"zzZz", b"PLTE", b"fcTL"][int(generator.integers(5))]
    return png(shape, chunk(name, b"k\0v" if name == b"tEXt" else b"") * int(10 ** generator.uniform(2, 4.7)))


def _other(shape: Shape, generator: Generator) -> bytes:
    mode, kind = str(generator.choice(_MODES)), str(generator.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    size = (*(int(side) for side in generator.integers(1, 40, 2)), 1)
    try:
        return file_of(size if generator.integers(2) else (*shape[:2], 1), kind, generator, mode)
    except (OSError, ValueError):  # a mode that the format has not
        return generator.bytes(int(generator.integers(1, 3000)))


IMAGES: dict[str, Maker] = {
    "damaged PNG": lambda shape, g: damaged(file_of(shape, "PNG", g), g),
    "damaged JPEG": lambda shape, g: damaged(file_of(shape, "JPEG", g), g),
    "damaged progressive JPEG": lambda shape, g: damaged(file_of(shape, "JPEG", g, progressive=True), g),
    "rearranged PNG": lambda shape, g: rearranged(file_of(shape, "PNG", g), g),
    "PNG of billions of pixels": _bomb,
    "JPEG of another size": _wide_jpeg,
    "inflating pixels": lambda shape, g: png(shape, data=zeros(64)),
    "inflating profile or text": _inflating,
    "thousands of chunks": _chunks,
    "thousands of scans": lambda shape, g: scans(shape, int(10 ** g.uniform(2, 4)), g),
    "thousands of segments": lambda shape, g: segments(shape, int(10 ** g.uniform(2, 4.7)), g),
    "malformed application data": application,
    "another mode, size or format": _other,
    "text, path or URL": lambda shape, g: _TEXTS[int(g.integers(len(_TEXTS)))],
    "more bytes than are taken": lambda shape, g: png(shape) + bytes(8 * 2**20 + int(g.integers(2**20))),
    "noise": lambda shape, g: g.bytes(int(g.integers(1, 5000))),
}
_WEIGHT = {"inflating pixels": 0.3, "inflating profile or text": 0.3, "thousands of chunks": 0.3}
_WEIGHT |= {"thousands of scans": 0.3, "thousands of segments": 0.3, "PNG of billions of pixels": 0.5}
_WEIGHT |= {"more bytes than are taken": 0.1}


def image(shape: Shape, generator: Generator) -> tuple[str, bytes]:
    """A hostile image and its kind."""
    weights = np.array([_WEIGHT.get(kind, 1.0) for kind in IMAGES])
    kind = str(generator.choice(list(IMAGES), p=weights / weights.sum()))
    return kind, IMAGES[kind](shape, generator)


def _single(shape: Shape, g: Generator) -> Hostile:
    kind, body = image(shape, g)
    return Hostile(kind, "/v1/classify", body, {"content-type": "image/png"})


def _multipart(shape: Shape, g: Generator) -> Hostile:
    parts = [
        b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n%b\r\n" % file_of(shape, "PNG", g)
        for _ in range(g.integers(1, 6))
    ]
    body = b"".join([*parts, b"--xx--\r\n"])
    way = g.integers(4)
    if way == 0:
        body = damaged(body, g)
    elif way == 1:
        body = body.replace(b"filename", b"f" * int(10 ** g.uniform(1, 5)), 1)
    elif way == 2:
        body = parts[0][: parts[0].find(b"\r\n\r\n")] + b"\r\nx: y" * int(10 ** g.uniform(1, 5)) + body
    boundary = ["xx", "yy", "", "x" * 5000][int(g.choice(4, p=[0.7, 0.1, 0.1, 0.1]))]
    return Hostile(
        "multipart", "/v1/classify/batch", body, {"content-type": f"multipart/form-data; boundary={boundary}"}
    )


def _arrow(shape: Shape, g: Generator) -> Hostile:
    sink = io.BytesIO()
    images = [file_of(shape, "PNG", g) for _ in range(g.integers(1, 6))]
    table = pa.table({"image": pa.array(images, pa.binary())})
    compression = [None, "zstd", "lz4"][int(g.choice(3, p=[0.8, 0.1, 0.1]))]
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    headers = {"content-type": "application/vnd.apache.arrow.stream"}
    return Hostile("Arrow", "/v1/classify/batch", damaged(sink.getvalue(), g), headers)


def _json(g: Generator, depth: int = 0) -> object:
    """Any JSON."""
    scalars: list[object] = [None, True, -1, 10**30, 1e308, "image", "YQ==", "\ud7ff\0", float(g.normal())]
    way = g.integers(4) if depth < 4 else 0
    if way <= 1:
        return scalars[int(g.integers(len(scalars)))]
    values = [_json(g, depth + 1) for _ in range(g.integers(4))]
    keys = ("inputs", "data", "shape", "datatype", "parameters", "name", "columns", "image")
    return values if way == 2 else {str(g.choice(keys)): value for value in values}


def _crowded(g: Generator, path: str) -> Hostile:
    """JSON of one thing so often that reading it takes seconds and gigabytes."""
    one = [b"[]", b"{}", b"0", b'""', b'{"a":0}', b"[[[0]]]", b"1e-300", b"9" * 4000][int(g.integers(8))]
    body = b'{"inputs":[' + b",".join([one] * min(int(10 ** g.uniform(3, 6.8)), 2**26 // (len(one) + 2))) + b"]}"
    return Hostile("crowded JSON", path, body, {"content-type": "application/json"})


def _v2(shape: Shape, g: Generator) -> Hostile:
    if g.integers(20) == 0:
        return _crowded(g, "/v2/models/meanet/infer")
    body, way = file_of(shape, "PNG", g), g.integers(3)
    tensor: dict[str, object] = {"name": "image", "datatype": "BYTES", "shape": [1]}
    headers, binary = {"content-type": "application/json"}, b""
    if way == 0:
        tensor["data"] = [base64.b64encode(damaged(body, g)).decode()]
    elif way == 1:
        binary = damaged(struct.pack("<I", len(body)) + body, g)
        tensor["parameters"] = {"binary_data_size": len(binary) + int(g.integers(-1, 2))}
    key = str(g.choice(["name", "datatype", "shape", "data", "parameters", "none"]))
    if key != "none":
        tensor[key] = _json(g)
    header = json.dumps(
        {"inputs": [tensor], "parameters": _json(g)} if g.integers(2) else {"inputs": [tensor]}
    ).encode()
    if binary or way == 2:
        length = [len(header), -1, 10**30, len(header) + len(binary) + 1][int(g.choice(4, p=[0.7, 0.1, 0.1, 0.1]))]
        headers["inference-header-content-length"] = str(length)
    return Hostile("protocol v2", "/v2/models/meanet/infer", header + binary, headers)


def _invocation(shape: Shape, g: Generator) -> Hostile:
    if g.integers(20) == 0:
        return _crowded(g, "/invocations")
    text = base64.b64encode(file_of(shape, "PNG", g)).decode()
    plain: list[object] = [
        {"dataframe_split": {"columns": ["image"], "data": [[text], _json(g)]}},
        {"inputs": _json(g)},
        {"instances": [text[: int(g.integers(len(text)))]]},
        {"dataframe_records": [{"image": text}, _json(g)]},
        _json(g),
    ]
    body = json.dumps(plain[int(g.integers(len(plain)))]).encode()
    if g.integers(3) == 0:
        body = damaged(body, g)
    elif g.integers(10) == 0:
        body = b'{"inputs":' + b"[" * 100_000
    return Hostile("invocations", "/invocations", body, {"content-type": "application/json"})


def _headers(shape: Shape, g: Generator) -> Hostile:
    body, size = file_of(shape, "PNG", g), int(10 ** g.uniform(2, 5.3))
    choices: list[dict[str, str]] = [
        {"x-long": "a" * size},
        {f"x-{number}": "a" for number in range(size // 50)},
        {"content-type": "a" * size},
        {"content-type": "multipart/form-data; boundary=" + "\xff" * 20},
        {"cookie": "a=" + "b" * size},
        {"inference-header-content-length": "9" * min(size, 6000)},
        {"x-request-id": "\x7f" * 40},
        {"content-encoding": "gzip"},
        {"accept": "application/x-nothing"},
    ]
    paths = ("/v1/classify", "/v1/classify/batch", "/v2/models/meanet/infer", "/invocations")
    return Hostile("headers", str(g.choice(paths)), body, choices[int(g.integers(len(choices)))])


def _query(shape: Shape, g: Generator) -> Hostile:
    values = ("nan", "-inf", "1e999", "%00", "%ff%fe", "true&edge_only=false", "9" * 5000, "a%22b", "0", "-1", "")
    names = ("threshold", "deadline_ms", "edge_only", "unknown", "%F0%9F%98%80")
    query = "&".join(f"{g.choice(names)}={g.choice(values)}" for _ in range(g.integers(1, 4)))
    paths = (
        "/v1/classify",
        "/v1/../v1/classify",
        "//v1/classify",
        "/v2/models/%00/infer",
        "/v2/models/meanet/versions/9x/infer",
    )
    method = str(g.choice(["POST", "PUT", "GET", "DELETE", "PATCH", "OPTIONS"], p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    return Hostile("query, path or method", f"{g.choice(paths)}?{query}", file_of(shape, "PNG", g), {}, method)


def requests(shape: Shape, seed: int, count: int) -> Iterator[Hostile]:
    """So many hostile requests: half of them are images, the others damage a protocol."""
    generator = np.random.default_rng(seed)
    others = (_multipart, _arrow, _v2, _invocation, _headers, _query)
    for _ in range(count):
        maker = _single if generator.integers(2) else others[int(generator.integers(len(others)))]
        yield maker(shape, generator)
