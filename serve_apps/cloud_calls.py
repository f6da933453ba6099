"""The edge's calls to the cloud: one a micro-batch, each sample within its own deadline, and what happens without."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meanet.breaker import Breaker
from meanet.config import jpeg_quality
from meanet.deadlines import cloud_patience
from meanet.preprocessing import Preprocessing, encode_jpeg
from meanet.routing import Exit, Ints, Reading
from meanet.runtime import Images
from serve_apps.micro_batch import Pass, Task, Upload, mask
from serve_apps.observer import CallOutcome, Observer
from serve_apps.settings import Settings
from serve_apps.traces import TRACEPARENT

_PROBE_IMAGES = 8


@dataclass(frozen=True)
class CloudRequest:
    """What goes up, of N samples: files, or pixels where the payload is raw or no file was received."""

    version: int
    """Of the model, whose cloud network is to answer."""
    bodies: Sequence[bytes] | None
    """N PNG or JPEG files, or"""
    images: Images | None
    """(N, H, W, C)."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each sample."""
        if self.bodies is not None:
            return [len(body) for body in self.bodies]
        assert self.images is not None, "a request has one or the other"
        return [image.nbytes for image in self.images]

    def pixels(self, preprocessing: Preprocessing) -> Images:
        """(N, H, W, C) as the cloud sees them.

        Raises:
            UserError: a body is no image.
        """
        if self.bodies is not None:
            return np.stack([preprocessing.decode(body) for body in self.bodies])
        assert self.images is not None, "a request has one or the other"
        return self.images


@dataclass(frozen=True)
class CloudAnswer:
    """What the cloud deployment returns for N images."""

    class_ids: list[int]
    confidences: list[float]
    node: str = ""
    """Ray's id of the node that answered."""
    seconds: float = 0.0
    """What it took there, by that node's clock."""


AskCloud = Callable[[CloudRequest], Awaitable[CloudAnswer]]


class CloudCalls:
    """Of one replica. A call that fails, is late or lies costs its samples nothing but the cloud's opinion."""

    def __init__(self, ask: AskCloud, settings: Settings, observer: Observer) -> None:
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_open_s)
        self._ask, self._settings, self._observer = ask, settings, observer
        self._under_way = 0
        self.away = 0
        """Requests of one image that wait for the cloud."""
        self._waiting: set[asyncio.Task[None]] = set()

    def configure(self, settings: Settings) -> None:
        """From now on; the breaker stays as it stands."""
        self._settings = settings
        self.breaker.failures, self.breaker.open_s = settings.breaker_failures, settings.breaker_open_s

    def settle(self, batch: Pass) -> None:
        """See to it that the waiting samples are answered, beside what follows if that takes time."""
        if self.breaker.claim_probe():
            self._beside(self._probe(batch))
        if batch.alone is not None:
            batch.resolve(mask(batch.pending.rows, len(batch.tasks)), 0.0, batch.alone)
        elif not self.breaker.allows():  # it has opened since the pass
            self._beside(self._answer_alone(batch, batch.pending.rows, 0.0, "cloud circuit open"))
        elif self._under_way >= self._settings.max_cloud_calls:
            busy = f"cloud busy: {self._under_way} calls under way"
            self._beside(self._answer_alone(batch, batch.pending.rows, 0.0, busy))
        else:
            self._under_way += 1
            self._beside(self._call(batch))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run beside what follows."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())  # nobody's request alone
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _probe(self, batch: Pass) -> None:
        """Ask the cloud for a few images whose answers nobody waits for."""
        rows, started, success = batch.pending.rows[:_PROBE_IMAGES], time.monotonic(), False
        num_bytes = 0
        try:
            request = await _request(batch, rows)
            num_bytes = sum(request.sizes)
            call = asyncio.ensure_future(self._ask(request))
            await asyncio.wait({call}, timeout=self._settings.cloud_budget_s)
            _checked(_result(call), len(rows), len(batch.served.model.class_names))
            success = True
        except Exception:  # whatever it is, the cloud is not back
            success = False
        finally:
            self.breaker.record_probe(success=success)
            seconds = time.monotonic() - started
            self._observer.cloud_call(len(rows), num_bytes, seconds, "probe ok" if success else "probe failed")

    async def _call(self, batch: Pass) -> None:
        """One call for all complex samples of a micro-batch; a sample whose time is up does not wait for it."""
        started, rows = time.monotonic(), batch.pending.rows
        limits = {int(row): self._limit(batch.tasks[row], started) for row in rows}
        TRACEPARENT.set(next((batch.tasks[row].traceparent for row in rows if batch.tasks[row].traceparent), None))
        call: asyncio.Future[CloudAnswer] | None = None
        away = {int(row) for row in rows if batch.tasks[row].place is None}
        self.away += len(away)
        try:
            if max(limits.values()) <= started:
                await self._answer_alone(batch, rows, 0.0, "no time for the cloud")
                return
            request = await _request(batch, rows)
            for row, size in zip(rows, request.sizes, strict=True):
                batch.tasks[row].bytes_sent = size
            asked, call = time.monotonic(), asyncio.ensure_future(self._ask(request))
            left = dict(limits)
            while left and not call.done():
                await asyncio.wait({call}, timeout=max(0.0, min(left.values()) - time.monotonic()))
                late = [row for row, limit in left.items() if limit <= time.monotonic()] if not call.done() else []
                if late:
                    await self._answer_alone(batch, np.array(late), time.monotonic() - started, "cloud timed out")
                    self.away -= len(away & {*late})
                    away -= {*late}
                    left = {row: limit for row, limit in left.items() if row not in late}
            reading = _checked(_result(call), len(rows), len(batch.served.model.class_names))
            upload = self._uploaded(batch, sum(request.sizes), time.monotonic() - asked - _result(call).seconds)
            for row in left:
                batch.tasks[row].cloud_node, batch.tasks[row].upload = _result(call).node, upload
            self.breaker.record(success=True)
            self._accept(batch, np.array(sorted(left), dtype=np.int64), reading, time.monotonic() - started)
            self._observer.cloud_call(len(rows), sum(request.sizes), time.monotonic() - started, "ok")
        except Exception as error:  # a lost cloud raises many kinds; none may cost the client its answer
            await self._failed(batch, list(limits), error, started)
        finally:
            self._under_way -= 1
            self.away -= len(away)
            if call is not None:
                call.cancel()

    async def _failed(self, batch: Pass, rows: list[int], error: Exception, started: float) -> None:
        seconds, timed_out = time.monotonic() - started, isinstance(error, TimeoutError)
        limits = self._settings
        patience = cloud_patience(limits.cloud_budget_s, limits.deadline_s, limits.reserve_s)
        in_haste = timed_out and seconds < 0.95 * patience
        if not in_haste:  # clients' short deadlines say nothing of the cloud
            self.breaker.record(success=False)
        num_bytes = sum(batch.tasks[row].bytes_sent for row in rows)
        self._observer.cloud_call(len(rows), num_bytes, seconds, "timed out" if timed_out else "failed")
        reason = "cloud timed out" if timed_out else f"cloud failed: {type(error).__name__}"
        waiting = np.array([row for row in rows if not batch.tasks[row].answer.done()], dtype=np.int64)
        await self._answer_alone(batch, waiting, seconds, reason)

    async def second_opinion(self, batch: Pass, rows: Ints) -> Reading | None:
        """What the cloud says of samples that were answered without it; None where it cannot be had.

        Nobody waits for it, the requests' own calls come first, and the breaker learns nothing of it.
        """
        if not self.breaker.allows() or self._under_way >= self._settings.max_cloud_calls:
            return None
        started, num_bytes, reading = time.monotonic(), 0, None
        try:
            request = await _request(batch, rows)
            num_bytes = sum(request.sizes)
            answer = await asyncio.wait_for(self._ask(request), self._settings.cloud_budget_s)
            reading = _checked(answer, len(rows), len(batch.served.model.class_names))
        except Exception:  # whatever it is, there is no opinion
            reading = None
        outcome: CallOutcome = "audit failed" if reading is None else "audit ok"
        self._observer.cloud_call(len(rows), num_bytes, time.monotonic() - started, outcome)
        return reading

    def _limit(self, task: Task, now: float) -> float:
        """When a sample stops waiting for the cloud."""
        return min(now + self._settings.cloud_budget_s, task.deadline - self._settings.reserve_s)

    def _uploaded(self, batch: Pass, num_bytes: int, seconds: float) -> Upload:
        """What a call's way to the cloud and back took, beside what the model's link would take."""
        upload = Upload(max(0.0, seconds), float(batch.served.costs.upload_seconds(num_bytes)))
        self._observer.uploaded(upload.seconds, upload.modelled)
        return upload

    @staticmethod
    def _accept(batch: Pass, rows: Ints, reading: Reading, seconds: float) -> None:
        """The cloud's answers for those of the waiting samples that still wait."""
        place = np.searchsorted(batch.pending.rows, rows)
        batch.answers.accept(rows, Exit.CLOUD, reading.take(place))
        batch.resolve(mask(rows, len(batch.tasks)), 1000 * seconds, None)

    @staticmethod
    async def _answer_alone(batch: Pass, rows: Ints, seconds: float, reason: str) -> None:
        """The edge's best answer for these samples, marked."""
        if not len(rows):
            return
        try:
            await asyncio.to_thread(batch.finish_alone, rows)
            batch.resolve(mask(rows, len(batch.tasks)), 1000 * seconds, reason)
        except Exception as error:  # whatever it is, these requests must hear of it
            for row in rows:
                if not batch.tasks[row].answer.done():
                    batch.tasks[row].answer.set_exception(error)


async def _request(batch: Pass, rows: Ints) -> CloudRequest:
    """What goes up of these samples: the bytes as they were received, JPEG at a quality, or raw pixels."""
    payload, version = batch.served.model.energy.payload, batch.served.version
    quality = jpeg_quality(payload)
    if quality is not None:
        return CloudRequest(version, await asyncio.to_thread(_recompressed, batch, rows, quality), None)
    bodies = [body for row in rows if (body := batch.tasks[row].body) is not None]
    if payload == "raw" or len(bodies) < len(rows):  # a micro-batch may mix files and pixels
        return CloudRequest(version, None, batch.images[rows])
    return CloudRequest(version, bodies, None)


def upload_sizes(batch: Pass) -> Ints:
    """(N,) bytes that each image of a pass would take up to the cloud; where they are recompressed, the first one's."""
    payload, count = batch.served.model.energy.payload, len(batch.tasks)
    quality, pixels = jpeg_quality(payload), batch.images[0].nbytes
    if quality is not None:
        return np.full(count, len(encode_jpeg(batch.images[0], quality)))
    if payload == "raw":
        return np.full(count, pixels)
    return np.array([pixels if task.body is None else len(task.body) for task in batch.tasks])


def _recompressed(batch: Pass, rows: Ints, quality: int) -> list[bytes]:
    return [encode_jpeg(batch.images[row], quality) for row in rows]


def _result(call: "asyncio.Future[CloudAnswer]") -> CloudAnswer:
    """What a call has brought; not being over is a time-out, and being cancelled by others a failure like any other."""
    if not call.done():
        call.cancel()
        raise TimeoutError
    if call.cancelled():
        raise ConnectionError("the call was cancelled")
    return call.result()


def _checked(answer: CloudAnswer, count: int, num_classes: int) -> Reading:
    """The cloud's answer as a reading; a wrong shape, class or number counts as a failure."""
    pred = np.asarray(answer.class_ids, dtype=np.int64)
    confidence = np.asarray(answer.confidences, dtype=np.float64)
    if pred.shape != (count,) or confidence.shape != (count,):
        raise ValueError(f"the cloud answered {pred.shape} for {count} images")
    if not (np.isfinite(confidence).all() and (pred >= 0).all() and (pred < num_classes).all()):
        raise ValueError("the cloud answered a class or a confidence that does not exist")
    return Reading(pred, confidence, np.zeros(count), np.zeros(count))
