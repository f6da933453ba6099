"""Replicas as numbers and ranges, and the nodes that they ask for."""

from typing import Any

import pytest

from meanet.errors import UserError
from serve_apps.graph import AppArgs
from serve_apps.placement import Scaling, options, replicas_of


def test_numbers_and_ranges() -> None:
    assert replicas_of("3", "--edge-replicas") == 3
    assert replicas_of("1-4", "--edge-replicas") == Scaling(min=1, max=4)
    for text in ("0", "-1", "1-", "4-1", "x", "1-2-3", "0-2", ""):
        with pytest.raises(UserError, match=f"--edge-replicas is {text}:"):
            replicas_of(text, "--edge-replicas")


def test_edge_and_cloud_scale_apart() -> None:
    args = AppArgs.model_validate(
        {"tracking_uri": "x", "edge_replicas": {"min": 2, "max": 5, "target_ongoing_requests": 3}, "cloud_replicas": 1}
    )
    edge = options(args.edge_replicas, "edge", args.pin, {}, 1.0)
    assert edge["autoscaling_config"]["max_replicas"] == 5
    assert edge["autoscaling_config"]["target_ongoing_requests"] == 3
    assert "num_replicas" not in edge
    cloud = options(args.cloud_replicas, "cloud", args.pin, {}, 1.0)
    assert (cloud["num_replicas"], "autoscaling_config" in cloud) == (1, False)


@pytest.mark.parametrize(
    ("pin", "cluster", "asks"),
    [
        ("auto", {"CPU": 4.0}, None),
        ("auto", {"CPU": 4.0, "edge": 1.0}, {"edge": 0.001}),
        ("auto", {"CPU": 4.0, "cloud": 1.0}, None),
        ("always", {"CPU": 4.0}, {"edge": 0.001}),
        ("never", {"edge": 1.0}, None),
    ],
)
def test_replicas_ask_for_nodes_of_their_own(
    pin: Any, cluster: dict[str, float], asks: dict[str, float] | None
) -> None:
    assert options(1, "edge", pin, cluster, 1.0)["ray_actor_options"].get("resources") == asks


@pytest.mark.parametrize("scaling", [{"max": 0}, {"min": 3, "max": 2}, {"max": 2, "up": 1}, {"min": 0, "max": 2}])
def test_senseless_ranges_are_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="edge_replicas"):
        AppArgs.model_validate({"tracking_uri": "x", "edge_replicas": scaling})


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("place", ["edge_replicas", "cloud_replicas"])
def test_deployment_without_replicas_is_refused(place: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"(?s){place}.*greater than or equal to 1.*input_value={count}"):
        AppArgs.model_validate({"tracking_uri": "x", place: count})
