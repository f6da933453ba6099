"""The simulated fleet: against queueing theory, against itself in two ways, and what it advises."""

import dataclasses
import math

import numpy as np
import pytest

from meanet.errors import UserError
from meanet.evaluation import ExitsTable
from meanet.fleet.advice import Adviser, bottleneck, why_not
from meanet.fleet.aggregate import simulate_aggregated
from meanet.fleet.exact import simulate_exactly
from meanet.fleet.model import Arrivals, Autoscaling, CloudTimes, EdgeTimes, Fleet, Limits, Link
from meanet.fleet.outcome import Outcome, Price
from meanet.fleet.queueing import Load, erlang_b, waiting
from meanet.fleet.rates import curve
from meanet.fleet.run import Simulator
from meanet.fleet.scaling import Autoscaler, Replicas
from meanet.fleet.workload import Workload, workload
from meanet.replay import replay
from meanet.routing import Policy


def images(cloud: float, extension: float = 0.0, samples: int = 1000) -> Workload:
    """Samples of which so many want the cloud and so many others the extension block."""
    place = np.arange(samples)
    gone = place < cloud * samples
    extended = (place >= cloud * samples) & (place < (cloud + extension) * samples)
    right_alone = place % 10 != 0
    return Workload(
        gone=gone,
        extended=extended,
        extended_alone=extended | gone,
        num_bytes=np.full(samples, 2000.0),
        upload_joules=np.full(samples, 0.01),
        right=np.ones(samples, dtype=bool),
        right_alone=right_alone,
        main_joules=1e-3,
        extension_joules=5e-4,
        source="modelled:test",
    )


FLEET = Fleet(
    devices=200,
    edge=EdgeTimes(main_s=0.01, extension_s=0.005, front_s=0.002),
    cloud=CloudTimes(image_s=0.008, call_s=0.002),
    link=Link(bytes_per_second=1e6, rtt_seconds=0.01),
    arrivals=Arrivals(rate=1.0),
    scaling=Autoscaling(max_replicas=1),
    horizon_s=300.0,
)


def both(fleet: Fleet, work: Workload) -> tuple[Outcome, Outcome]:
    return simulate_exactly(fleet, work), simulate_aggregated(fleet, work)


# Theory


def test_erlang_b_is_the_recursion() -> None:
    for offered in (0.5, 8.0, 40.0):
        known = 1.0
        for servers in range(1, 60):
            known = offered * known / (servers + offered * known)
            assert erlang_b(servers, offered) == pytest.approx(known, rel=1e-9)


def test_waiting_of_one_server_is_pollaczek_khinchine() -> None:
    for load, variation in ((0.5, 1.0), (0.8, 0.0), (0.9, 2.0)):
        law = waiting(Load(load / 0.01, 0.01, variation, 1, patience_s=1e3))
        assert law.mean_wait == pytest.approx(load * 0.01 * (1 + variation) / 2 / (1 - load), rel=1e-6)
        assert law.at_once == pytest.approx(1 - load)
        waits, leaves = law.draw(200_000, np.random.default_rng(0))
        assert waits.mean() == pytest.approx(law.mean_wait, rel=0.03)
        assert not leaves.any()
        assert law.within(law.mean_wait) == pytest.approx((waits <= law.mean_wait).mean(), abs=0.01)


@pytest.mark.parametrize("load", [0.5, 0.999, 1.0, 1.001, 1.5, 30.0])
@pytest.mark.parametrize("replicas", [1, 20, 3000])
def test_what_a_full_cloud_does_not_take_leaves(load: float, replicas: int) -> None:
    law = waiting(Load(load * replicas / 0.01, 0.01, 1.0, replicas, patience_s=0.5))
    assert 0 <= law.leaves <= 1
    assert 0 <= law.mean_wait <= 0.5
    assert law.leaves >= 1 - 1 / load - 1e-9
    assert law.utilisation == pytest.approx(min(1.0, load), abs=0.1)
    assert law.within(0.5) == pytest.approx(1 - law.leaves)
    assert [law.within(x) for x in (0.0, 0.1, 0.4)] == sorted(law.within(x) for x in (0.0, 0.1, 0.4))


def test_exact_cloud_is_an_m_d_1_queue() -> None:
    """One device without end, an edge of no time: Poisson calls of fixed length, one replica."""
    fleet = dataclasses.replace(
        FLEET,
        edge=EdgeTimes(main_s=1e-9, max_batch=1),
        link=Link(bytes_per_second=1e12),
        cloud=CloudTimes(image_s=0.01),
        arrivals=Arrivals(rate=0.35),
        limits=Limits(cloud_budget_s=100.0, deadline_s=1000.0),
        horizon_s=1000.0,
    )
    found = simulate_exactly(fleet, images(1.0))
    load = 200 * 0.35 * 0.01
    assert found.utilisation == pytest.approx(load, rel=0.03)
    # Median of an M/D/1 wait (Erlang's series), plus the service.
    assert found.latency["p50"] == pytest.approx(_m_d_1_quantile(load, 0.5, 0.01) + 0.01, rel=0.05)
    assert found.latency["p90"] == pytest.approx(_m_d_1_quantile(load, 0.9, 0.01) + 0.01, rel=0.05)


def _m_d_1_quantile(load: float, share: float, service: float) -> float:
    """P(wait <= t) = (1 - load) sum over j <= t / service of (load (j - t/s))^j / j! exp(-load (j - t/s))."""

    def below(t: float) -> float:
        terms = []
        for j in range(int(t) + 1):
            x = load * (j - t)
            terms.append(x**j / math.factorial(j) * math.exp(-x))
        return (1 - load) * sum(terms)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return low * service


# The exact simulation


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sources_per_edge": 7, "edge": EdgeTimes(main_s=0.12, max_batch=4)},
        {"edge": EdgeTimes(main_s=1.3), "limits": Limits(max_queued=2)},
        {"limits": Limits(cloud_budget_s=0.015)},
        {"arrivals": Arrivals(rate=5.0)},
        {"devices": 1, "arrivals": Arrivals(rate=50.0), "cloud": CloudTimes(image_s=0.2)},
    ],
)
def test_every_image_has_one_answer(change: dict[str, object]) -> None:
    fleet = dataclasses.replace(FLEET, horizon_s=60.0, **change)  # type: ignore[arg-type]
    found = simulate_exactly(fleet, images(0.3, 0.2))
    assert sum(found.share.values()) == pytest.approx(1)
    expected = fleet.devices * fleet.arrivals.rate * 60
    assert found.images == pytest.approx(expected, abs=5 * expected**0.5)
    assert found.share["cloud"] + found.share["degraded"] == pytest.approx(0.3 * (1 - found.share["refused"]), abs=0.03)


def test_without_load_times_and_joules_add_up() -> None:
    fleet = dataclasses.replace(FLEET, devices=1, arrivals=Arrivals(rate=0.05), horizon_s=40_000.0)
    found = simulate_exactly(fleet, images(1.0))
    assert found.latency["p50"] == pytest.approx(0.002 + 0.01 + 0.002 + 0.01 + 0.01, rel=1e-3)
    assert found.joules == {"edge_compute": pytest.approx(1e-3), "upload": pytest.approx(0.01)}
    assert found.joules_device_hour == pytest.approx(0.011 * found.images / (40_000 / 3600))
    assert found.share["cloud"] == pytest.approx(1, abs=1e-3)
    found = simulate_exactly(dataclasses.replace(fleet, idle_watts=2.0), images(0.0, 1.0))
    assert found.latency["p99"] == pytest.approx(0.017, rel=0.05)
    assert found.joules_device_hour > 7200


def test_fronts_spread_about_their_median() -> None:
    """Edge and cloud take as good as no time here: what is left is what stands before and after."""
    edge = EdgeTimes(main_s=1e-6, front_s=0.004, front_spread=0.5)
    fleet = dataclasses.replace(FLEET, devices=20, edge=edge, arrivals=Arrivals(rate=2.0))
    found = both(fleet, images(0.0, 0.5))
    for outcome in found:
        assert outcome.latency["p50"] == pytest.approx(0.004, rel=0.03)
        assert outcome.latency["p90"] == pytest.approx(0.004 * math.exp(0.5 * 1.2816), rel=0.03)
    same = dataclasses.replace(fleet, edge=dataclasses.replace(edge, front_spread=0.0))
    for outcome in both(same, images(0.0, 0.5)):
        assert outcome.latency["p99"] == pytest.approx(0.004, rel=0.01)


def test_a_cloud_out_of_reach_costs_its_budget_then_the_breaker_opens() -> None:
    fleet = dataclasses.replace(
        FLEET, devices=1, arrivals=Arrivals(rate=20.0), cloud=CloudTimes(image_s=10.0), horizon_s=100.0
    )
    found = simulate_exactly(fleet, images(1.0))
    assert found.share["cloud"] == 0
    assert found.share["degraded"] > 0.99
    assert found.accuracy == pytest.approx(0.9, abs=0.02), "the edge's own answers"
    assert found.latency["p50"] < 0.1, "nobody waits while the breaker is open"
    assert found.joules["upload"] < 0.01 * 0.2, "only probes are sent"


def test_same_seed_same_numbers() -> None:
    fleet = dataclasses.replace(FLEET, horizon_s=30.0)
    for mode in (simulate_exactly, simulate_aggregated):
        assert mode(fleet, images(0.2), 3) == mode(fleet, images(0.2), 3)
        assert mode(fleet, images(0.2), 3) != mode(fleet, images(0.2), 4)


# Exact against aggregated


BUSY = Autoscaling(max_replicas=20, target_ongoing_requests=1.0, upscale_delay_s=20.0)
BURSTS = Arrivals(rate=0.5, bursts_per_day=400, burst_factor=6.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="light"),
        pytest.param({"arrivals": Arrivals(rate=2.0)}, id="80% busy"),
        pytest.param({"arrivals": Arrivals(rate=2.0), "sources_per_edge": 20}, id="gateways"),
        pytest.param({"arrivals": Arrivals(rate=3.0), "scaling": BUSY, "warm": False}, id="scaled up"),
    ],
)
def test_aggregated_agrees_with_exact(change: dict[str, object]) -> None:
    exact, aggregated = both(dataclasses.replace(FLEET, **change), images(0.2, 0.3))  # type: ignore[arg-type]
    for name in ("p50", "p90"):
        assert aggregated.latency[name] == pytest.approx(exact.latency[name], rel=0.05), name
        assert aggregated.latency_cloud[name] == pytest.approx(exact.latency_cloud[name], rel=0.1), name
    assert aggregated.latency["p99"] == pytest.approx(exact.latency["p99"], rel=0.15)
    for name, share in exact.share.items():
        assert aggregated.share[name] == pytest.approx(share, rel=0.03, abs=0.003), name
    assert aggregated.utilisation == pytest.approx(exact.utilisation, rel=0.05, abs=0.005)
    assert aggregated.replicas_mean == pytest.approx(exact.replicas_mean, rel=0.1)
    assert sum(aggregated.joules.values()) == pytest.approx(sum(exact.joules.values()), rel=0.02)
    assert aggregated.accuracy == pytest.approx(exact.accuracy, abs=0.003)


@pytest.mark.parametrize("rate", [3.0, 5.0])
def test_aggregated_agrees_with_exact_in_overload(rate: float) -> None:
    """120% and 200% of what the one replica can do: degraded answers, and breakers that open."""
    exact, aggregated = both(dataclasses.replace(FLEET, arrivals=Arrivals(rate=rate)), images(0.2))
    assert exact.degraded > 0.05
    assert aggregated.degraded == pytest.approx(exact.degraded, rel=0.15)
    assert aggregated.joules["upload"] == pytest.approx(exact.joules["upload"], rel=0.15)


def test_a_million_devices_are_a_hundred_times_ten_thousand() -> None:
    scaling = Autoscaling(max_replicas=10**6, target_ongoing_requests=1.0)
    found = [
        simulate_aggregated(dataclasses.replace(FLEET, devices=devices, scaling=scaling), images(0.2))
        for devices in (10**4, 10**6)
    ]
    assert found[1].images == pytest.approx(100 * found[0].images, rel=0.01)
    assert 2000 <= found[1].replicas_mean <= 100 * found[0].replicas_mean, "a large queue needs less to spare"
    assert found[1].share["cloud"] == pytest.approx(0.2, abs=0.01)


def test_calls_under_way_bound_what_gateways_ask_of_a_full_cloud() -> None:
    fleet = dataclasses.replace(
        FLEET,
        devices=2000,
        sources_per_edge=50,
        edge=EdgeTimes(main_s=0.001),
        arrivals=Arrivals(rate=1.3),
        scaling=Autoscaling(min_replicas=10, max_replicas=10),
        horizon_s=60.0,
    )
    exact, aggregated = both(fleet, images(0.5))
    assert exact.degraded == pytest.approx(0.5 * (1 - 1 / 1.3), abs=0.02), "what ten replicas cannot take"
    assert aggregated.degraded == pytest.approx(exact.degraded, rel=0.2)


# Rates and replicas


def test_rates_follow_the_hours_and_the_bursts() -> None:
    hours = (0.0,) * 8 + (3.0,) * 8 + (0.0,) * 8
    day = curve(dataclasses.replace(FLEET, arrivals=Arrivals(rate=2.0, hours=hours), horizon_s=86400.0), 0)
    assert day.total == pytest.approx(2.0 * 86400, rel=1e-3)
    assert day.peak == pytest.approx(6.0)
    times = day.draw(3, np.random.default_rng(0))
    assert len(times) == pytest.approx(3 * day.total, rel=0.02)
    assert times.min() >= 7.5 * 3600
    assert times.max() <= 16.5 * 3600
    later = curve(
        dataclasses.replace(FLEET, arrivals=Arrivals(rate=2.0, hours=hours), start_hour=15.5, horizon_s=3600.0), 0
    )
    assert later.total == pytest.approx(6.0 * 1800, rel=0.01)
    bursts = curve(dataclasses.replace(FLEET, arrivals=BURSTS, horizon_s=86400.0), 1)
    assert bursts.peak == pytest.approx(3.0)
    assert bursts.total > 0.5 * 86400 * 1.5


def test_autoscaler_waits_its_delays() -> None:
    rule = Autoscaling(max_replicas=10, target_ongoing_requests=2, upscale_delay_s=20, downscale_delay_s=40)
    scaler = Autoscaler(rule, 1)
    assert [scaler.decide(10.0 * i, 8.0) for i in range(1, 5)] == [1, 1, 4, 4]
    assert [scaler.decide(10.0 * i, 100.0) for i in range(5, 9)] == [4, 4, 10, 10]
    assert [scaler.decide(10.0 * i, 0.0) for i in range(9, 18)] == [10, 10, 10, 10, 10, 10, 1, 1, 1]


def test_replicas_answer_after_their_start_and_cost_before() -> None:
    replicas = Replicas(Autoscaling(startup_s=5), 1)
    replicas.want(10.0, 3)
    assert (replicas.ready, replicas.paid) == (1, 3)
    replicas.pass_time(14.9)
    assert replicas.ready == 1
    replicas.pass_time(15.0)
    assert (replicas.ready, replicas.paid) == (3, 3)
    replicas.want(20.0, 4)
    replicas.want(21.0, 2)
    assert (replicas.ready, replicas.paid) == (2, 2)


# Bottleneck and advice


def test_bottleneck_lies_where_one_more_device_is_too_many() -> None:
    scaling = Autoscaling(max_replicas=4, target_ongoing_requests=0.8)
    simulator = Simulator(dataclasses.replace(FLEET, scaling=scaling), images(0.2), mode="aggregated")
    found = bottleneck(simulator, 100_000)
    assert found is not None
    full = 4 / (0.2 * 0.01)  # images a second that four replicas take
    assert 0.5 * full < found.devices <= full
    assert why_not(simulator.at(found.devices), 4) is None
    assert why_not(simulator.at(round(1.05 * found.devices)), 4) is not None
    assert bottleneck(simulator, found.devices // 2) is None


def test_slow_edges_are_not_blamed_on_the_cloud() -> None:
    fleet = dataclasses.replace(FLEET, edge=EdgeTimes(main_s=3.0), scaling=Autoscaling())
    found = bottleneck(Simulator(fleet, images(0.2), mode="aggregated"), 50)
    assert found is not None
    assert found.devices == 0
    assert "edge replicas refuse" in found.reason


def test_advice_fits_when_it_is_simulated_again(table: ExitsTable, point: Policy) -> None:
    work = workload(table.exits("test"), table.costs, point)
    assert work.cloud_share == pytest.approx(replay(table.exits("test"), table.costs, point).share["cloud"])
    full = 1 / (work.cloud_share * FLEET.cloud.service(1))
    fleet = dataclasses.replace(FLEET, devices=round(2 * full))
    assert why_not(Simulator(fleet, work).at(fleet.devices), 1) is not None
    found = Adviser(table, point, "test", seed=0, price=Price(), mode="aggregated").advise(fleet)
    assert found is not None
    assert found.policy.gate == point.gate
    assert found.policy.hard_classes == point.hard_classes
    assert 0 < found.after["cloud_share"] < found.before["cloud_share"]
    again = workload(table.exits("test"), table.costs, found.policy)
    assert why_not(simulate_aggregated(fleet, again, seed=7), 1) is None
    assert why_not(simulate_exactly(fleet, again), 1) is None


def test_models_check_what_flags_cannot() -> None:
    with pytest.raises(UserError, match="give 24"):
        Arrivals(hours=(1.0,))
    with pytest.raises(UserError, match="not all 0"):
        Arrivals(hours=(0.0,) * 24)
