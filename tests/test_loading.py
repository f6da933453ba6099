"""Versions as replicas load them: tried before they are served, and networks shared where the weights are the same."""

import dataclasses

import pytest

from meanet import artifact
from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.errors import UserError
from meanet.tracking import Tracker
from serve_apps.cloud_calls import CloudRequest
from serve_apps.loading import Loader


@pytest.fixture(scope="module")
def loader(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """A store with version 1; 2, its weights under another threshold; 3, weights that are not finite; 4, other weights;
    5, the weights of 1 with images scaled otherwise."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}")
    run = tracker.start_run("r", {}, {})
    assert model.operating_point is not None
    other = model.with_operating_point(model.operating_point | {"thresholds": [0.123]})
    networks = artifact.build_networks(model.recipe, model.preprocessing.image_shape, 10)
    for name in ("meanet", "cloud"):
        state = getattr(model.networks, name).state_dict()
        getattr(networks, name).load_state_dict({key: value * float("nan") for key, value in state.items()})
    nudged = artifact.build_networks(model.recipe, model.preprocessing.image_shape, 10)
    for name in ("meanet", "cloud"):
        state = getattr(model.networks, name).state_dict()
        getattr(nudged, name).load_state_dict({key: value + (value != 0) * 1e-3 for key, value in state.items()})
    scaled = dataclasses.replace(model.preprocessing, mean=(0.5,))
    for one in (
        model,
        other,
        dataclasses.replace(model, networks=networks),
        dataclasses.replace(model, networks=nudged),
        dataclasses.replace(model, preprocessing=scaled),
    ):
        tracker.register(one, run)
    return Loader(tracker.uri, "auto", "node")


def test_new_operating_point_shares_the_networks(loader: Loader) -> None:
    first = loader.edge(1, {})
    second = loader.edge(2, {1: first})
    assert second.runtime.engine is first.runtime.engine
    assert (second.version, second.policy.thresholds) == (2, (0.123,))
    assert first.policy.thresholds != second.policy.thresholds
    assert first.node == "node"
    cloud = loader.cloud(1, {})
    assert loader.cloud(2, {1: cloud}).runtime.engine is cloud.runtime.engine


def test_other_weights_are_not_shared(loader: Loader) -> None:
    first, cloud = loader.edge(1, {}), loader.cloud(1, {})
    for version in (4, 5):
        assert loader.edge(version, {1: first}).runtime.engine is not first.runtime.engine
        assert loader.cloud(version, {1: cloud}).runtime.engine is not cloud.runtime.engine


def test_weights_that_say_nothing_are_refused(loader: Loader) -> None:
    with pytest.raises(UserError, match="main exit of version 3 says nothing of a blank image"):
        loader.edge(3, {})
    with pytest.raises(UserError, match="cloud's network of version 3"):
        loader.cloud(3, {})


def test_cloud_answers_by_its_own_preprocessing(loader: Loader, splits: Splits) -> None:
    cloud = loader.cloud(1, {})
    class_ids, confidences = cloud.classify(CloudRequest(1, None, splits.table.images[splits.test[:5]]))
    assert len(class_ids) == len(confidences) == 5
    assert all(0 < confidence <= 1 for confidence in confidences)
