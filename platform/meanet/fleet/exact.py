"""Every image and every call of every device an event, by SimPy. What the server does stands in `serve_apps.edge`.

    image -> edge replica: a micro-batch of what waits -+-> easy or hard: answered
                                                        +-> complex: one call, upload -> queue -> cloud replica

Replicas of the cloud share one queue, first come first served, one call each at a time. A call whose time is up leaves
the queue; one that runs goes on in vain.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from meanet.breaker import Breaker
from meanet.deadlines import cloud_patience, longest_wait
from meanet.fleet.model import Fleet
from meanet.fleet.outcome import Images, Moment, Outcome, Price, Status, outcome
from meanet.fleet.rates import curve
from meanet.fleet.scaling import Autoscaler, Replicas, first_replicas
from meanet.fleet.workload import Workload
from meanet.routing import Floats, Ints

PROBE_IMAGES = 8


def simulate_exactly(fleet: Fleet, work: Workload, seed: int = 0, price: Price | None = None) -> Outcome:
    """Simulate every event; about 50,000 images a second of a CPU."""
    return _Simulation(fleet, work, seed).run(price or Price())


@dataclass
class _Call:
    """One call to the cloud."""

    images: int
    answered: Callable[[], None]
    """What to do when it is."""
    left: bool = False
    """Nobody waits any more."""
    running: bool = False


class _Cloud:
    """Replicas with one queue."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, replicas: int) -> None:
        self._env, self._times = env, fleet.cloud
        self.replicas = Replicas(fleet.scaling, replicas)
        self._queue: deque[_Call] = deque()
        self._running = self._ongoing = 0
        self._since = 0.0
        self.busy_s = self.ongoing_s = 0.0

    def put(self, call: _Call) -> None:
        self.count()
        self._ongoing += 1
        self._queue.append(call)
        self.dispatch()

    def leave(self, call: _Call) -> None:
        """Nobody waits for it any more; one that runs is not interrupted."""
        call.left = True
        if call in self._queue:
            self.count()
            self._queue.remove(call)
            self._ongoing -= 1

    def dispatch(self) -> None:
        """Give waiting calls to free replicas."""
        while self._queue and self._running < self.replicas.ready:
            call = self._queue.popleft()
            call.running = True
            self.count()
            self._running += 1
            _after(self._env, self._times.service(call.images), self._done, call)

    def _done(self, call: _Call) -> None:
        self.count()
        self._running -= 1
        self._ongoing -= 1
        if not call.left:
            call.answered()
        self.dispatch()

    def count(self) -> None:
        """Bring the sums up to now."""
        passed = self._env.now - self._since
        self.busy_s += passed * self._running
        self.ongoing_s += passed * self._ongoing
        self._since = self._env.now


@dataclass
class _Edge:
    """One edge replica."""

    breaker: Breaker
    queue: deque[int] = field(default_factory=deque)
    busy: bool = False
    calls: int = 0


class _Simulation:
    def __init__(self, fleet: Fleet, work: Workload, seed: int) -> None:
        self.fleet, self.limits = fleet, fleet.limits
        self.env = simpy.Environment()
        generator = np.random.default_rng((seed, 0))
        self.curve = curve(fleet, seed)
        self.arrived: Floats = self.curve.draw(fleet.devices, generator)
        count = len(self.arrived)
        self.place: Ints = generator.integers(0, fleet.devices, count) // fleet.sources_per_edge
        self.rows: Ints = generator.integers(0, len(work.gone), count)
        self.work, self.drawn = work, work.take(self.rows)
        self.fronts: Floats = fleet.edge.fronts(count, np.random.default_rng((seed, 5)))
        self.status = np.full(count, -1, dtype=np.int8)
        self.seconds = np.full(count, np.nan)
        self.sent = np.zeros(count, dtype=bool)
        first = first_replicas(fleet, float(self.curve.rates[0]) * fleet.devices, work.cloud_share)
        self.cloud = _Cloud(self.env, fleet, first)
        self.scaler = Autoscaler(fleet.scaling, first)
        self.edges = [
            _Edge(Breaker(self.limits.breaker_failures, self.limits.breaker_open_s, self._now))
            for _ in range(fleet.edges)
        ]
        self._gone, self._kinds = self.drawn.gone.tolist(), self.drawn.kinds.tolist()
        self._extended = self.drawn.extended.tolist()
        self.timeline: list[Moment] = []

    def _now(self) -> float:
        return float(self.env.now)

    def run(self, price: Price) -> Outcome:
        self.env.process(self._arrivals())
        self.env.process(self._controller())
        self.env.run()
        weight = np.ones(len(self.arrived))
        images = Images(self.rows, self.seconds, self.status, self.sent, weight)
        return outcome(self.fleet, self.work, images, self.timeline, mode="exact", price=price)

    def _arrivals(self) -> Generator[simpy.Event, None, None]:
        for image, (when, place) in enumerate(zip(self.arrived.tolist(), self.place.tolist(), strict=True)):
            yield self.env.timeout(when - self.env.now if when > self.env.now else 0.0)
            edge = self.edges[place]
            waiting = len(edge.queue)
            too_late = waiting * self.fleet.edge.main_s > longest_wait(self.limits.deadline_s)
            if waiting and (too_late or waiting + 1 > self.limits.max_queued):
                self.status[image] = Status.REFUSED
                continue
            edge.queue.append(image)
            if not edge.busy:
                self._start(edge)

    def _start(self, edge: _Edge) -> None:
        """The edge's blocks on what waits."""
        batch = [edge.queue.popleft() for _ in range(min(len(edge.queue), self.fleet.edge.max_batch))]
        edge.busy = True
        _after(
            self.env,
            self.fleet.edge.service(len(batch), sum(self._extended[i] for i in batch)),
            self._blocks_done,
            edge,
            batch,
        )

    def _blocks_done(self, edge: _Edge, batch: list[int]) -> None:
        for image in batch:
            if not self._gone[image]:
                self._answer(image, self._kinds[image])
        gone = [image for image in batch if self._gone[image]]
        if gone:
            self._want_cloud(edge, gone)
        edge.busy = False
        if edge.queue:
            self._start(edge)

    def _want_cloud(self, edge: _Edge, images: list[int]) -> None:
        if edge.breaker.claim_probe():
            self._probe(edge, images[:PROBE_IMAGES])
        if not edge.breaker.allows() or edge.calls >= self.limits.max_cloud_calls:
            self._alone(images)
        else:
            self._ask(edge, images)

    def _probe(self, edge: _Edge, images: list[int]) -> None:
        self.sent[images] = True
        over: list[bool] = []

        def end(success: bool) -> None:
            if not over:
                over.append(success)
                edge.breaker.record_probe(success=success)
                if not success:
                    self.cloud.leave(call)

        call = _Call(len(images), lambda: _after(self.env, self.fleet.link.rtt_seconds / 2, end, True))
        self._upload(call, images)
        _after(self.env, self.limits.cloud_budget_s, end, False)

    def _ask(self, edge: _Edge, images: list[int]) -> None:
        """One call for all of them; one whose time is up does not wait for it."""
        now, limits = self._now(), self.limits
        until = [
            min(now + limits.cloud_budget_s, float(self.arrived[i]) + limits.deadline_s - limits.reserve_s)
            for i in images
        ]
        last = max(until)
        if last <= now:
            self._alone(images)
            return
        edge.calls += 1
        self.sent[images] = True
        over: list[bool] = []

        def end(success: bool) -> None:
            if over:
                return
            over.append(success)
            edge.calls -= 1
            self._settle(images, until, success=success)
            patience = cloud_patience(limits.cloud_budget_s, limits.deadline_s, limits.reserve_s)
            in_haste = not success and last - now < 0.95 * patience
            if not in_haste:  # short deadlines say nothing of the cloud
                edge.breaker.record(success=success)
            if not success:
                self.cloud.leave(call)

        call = _Call(len(images), lambda: _after(self.env, self.fleet.link.rtt_seconds / 2, end, True))
        self._upload(call, images)
        _after(self.env, last - now, end, False)

    def _upload(self, call: _Call, images: list[int]) -> None:
        fleet = self.fleet
        seconds = float(self.drawn.num_bytes[images].sum()) / fleet.link.bytes_per_second
        seconds += fleet.link.rtt_seconds / 2 + fleet.cloud.network_s

        def arrive() -> None:
            if not call.left:
                self.cloud.put(call)

        _after(self.env, seconds, arrive)

    def _settle(self, images: list[int], until: list[float], *, success: bool) -> None:
        now = self._now()
        for image, limit in zip(images, until, strict=True):
            if success and now <= limit:
                self._answer(image, Status.CLOUD)
            else:
                self._alone([image], min(now, limit))

    def _alone(self, images: list[int], when: float | None = None) -> None:
        """The edge's own answers; the extension block, where it still has to run, takes its time beside the core."""
        late = 0.0 if when is None else self._now() - when
        for image in images:
            more = self.drawn.extended_alone[image] and not self._extended[image]
            self._answer(image, Status.DEGRADED, self.fleet.edge.extension_s * bool(more) - late)

    def _answer(self, image: int, status: int, later_s: float = 0.0) -> None:
        assert self.status[image] < 0, "an image has one answer"
        self.status[image] = status
        self.seconds[image] = self._now() + later_s - self.arrived[image] + self.fronts[image]

    def _controller(self) -> Generator[simpy.Event, None, None]:
        """Ray Serve's: how many replicas there are to be."""
        rule, cloud = self.fleet.scaling, self.cloud
        per_image = self.work.cloud_share * self.fleet.cloud.service(1)
        start = 0.0
        while start < self.fleet.horizon_s:
            seconds = min(rule.interval_s, self.fleet.horizon_s - start)
            cloud.busy_s = cloud.ongoing_s = 0.0
            have = cloud.replicas.ready
            yield self.env.timeout(seconds)
            cloud.count()
            cloud.replicas.want(self._now(), self.scaler.decide(self._now(), cloud.ongoing_s / seconds))
            _after(self.env, rule.startup_s, self._started)
            cloud.dispatch()
            rate = float(self.curve.mean(np.array(start), np.array(start + seconds))) * self.fleet.devices
            self.timeline.append(
                Moment(
                    start,
                    seconds,
                    rate,
                    have,
                    cloud.replicas.paid,
                    min(1.0, cloud.busy_s / seconds / max(have, cloud.replicas.ready)),
                    rate * per_image / rule.max_replicas,
                )
            )
            start += seconds

    def _started(self) -> None:
        self.cloud.replicas.pass_time(self._now())
        self.cloud.dispatch()


def _after(env: simpy.Environment, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
    """Do it so much later."""
    callbacks = env.timeout(seconds).callbacks
    assert callbacks is not None, "it has not happened yet"
    callbacks.append(lambda _event: action(*arguments))
