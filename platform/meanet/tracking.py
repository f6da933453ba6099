"""Runs, the model registry and its aliases: the only home of mlflow.

Every call names its run and its store; nothing here touches MLflow's global state. The registered model is `meanet`:
`candidate` is the newest version, `champion` the one that the server loads.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from sqlalchemy.exc import SQLAlchemyError

from meanet import artifact, engines, s3
from meanet.artifact import TrainedModel
from meanet.data import Images
from meanet.errors import AwayError, UserError, first_line
from meanet.routing import policy_id
from meanet.storage import writable_directory

MODEL = EXPERIMENT = "meanet"
CANDIDATE, CHAMPION = "candidate", "champion"
_PREVIOUS = "previous_champion"
_SQLITE = "sqlite:///"
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def store_uri(configured: str | None, setting: str = "MLFLOW_TRACKING_URI") -> str:
    """The configured tracking URI, or the embedded store: SQLite in outputs/mlflow, artifacts beside it.

    A SQLite file is named by its absolute path: workers and replicas run in other folders. Messages name the `setting`.

    Raises:
        UserError: it is no address, or holds a password, and what names a store is printed and kept.
    """
    uri = configured or "sqlite:///outputs/mlflow/mlflow.db"
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{setting} is no address ({error}): correct it, or unset it for the embedded store") from error
    if parts.password:
        raise UserError(
            f"{setting} holds a password for {parts.hostname}, and would be printed and kept: for a "
            "server leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; before a database "
            "start `mlflow server` and give its address"
        )
    if not uri.startswith(_SQLITE):
        return uri
    return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"


class _Guarded:
    """A client whose store may go away at any time: that is the user's to mend, and no stack trace."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._wrapped, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._wrapped, name)

        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if not _of_store(error):
                    raise
                raise AwayError(
                    f"the MLflow store {self._uri} does not answer any more ({first_line(error)}): bring it back and "
                    "give the same command again; what was finished is kept"
                ) from error

        return guarded


def _of_store(error: Exception) -> bool:
    """Whether the store, or the bucket of its artifacts, is what failed."""
    if isinstance(error, MlflowException):
        return error.error_code not in (*_MISSING, "RESOURCE_ALREADY_EXISTS")
    return isinstance(error, (SQLAlchemyError, OSError)) or type(error).__module__.startswith(("boto3.", "botocore."))


class Tracker:
    """One MLflow store.

    Raises:
        UserError: it cannot be reached or written.
    """

    def __init__(self, uri: str) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.uri = uri
        self._open = set[str]()  # runs that this process began or went on with
        s3.hand_on_endpoint()  # artifacts may lie there
        _check_reachable(uri)
        try:
            self._client = cast(MlflowClient, _Guarded(MlflowClient(tracking_uri=uri, registry_uri=uri), uri))
            self._experiment_id = self._experiment()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"the MLflow store {uri} cannot be used: {first_line(error)}; check MLFLOW_TRACKING_URI"
            ) from error

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found:
            return str(found.experiment_id)
        folder = _sqlite_folder(self.uri)
        location = (folder / "artifacts").as_uri() if folder else None
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))

    # Runs

    def start_run(
        self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
    ) -> str:
        """A new run; returns its id. With `parent`, nested below that run."""
        nested = {"mlflow.parentRunId": parent} if parent else {}
        run = self._client.create_run(self._experiment_id, tags={**tags, **nested}, run_name=name)
        self._open.add(str(run.info.run_id))
        rows = [Param(key, str(value)[:6000]) for key, value in flatten(params)]
        for start in range(0, len(rows), 100):
            self._client.log_batch(run.info.run_id, params=rows[start : start + 100])
        return str(run.info.run_id)

    def resume_run(self, run_id: str) -> bool:
        """Go on with a run, however an earlier process left it; False if it is not there, or was deleted."""
        try:
            if self._client.get_run(run_id).info.lifecycle_stage != "active":
                return False
        except MlflowException:
            return False
        self._client.update_run(run_id, "RUNNING")
        self._open.add(run_id)
        return True

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)
        self._open.discard(run_id)

    def close_open_runs(self, status: str, patience_s: float = 5.0) -> str | None:
        """Close as FAILED or KILLED what this process began or went on with.

        Args:
            status: which of them.
            patience_s: for how long a store that does not take it is asked again.

        Returns:
            Why some of them stay open, or None: the store is away.
        """
        deadline = time.monotonic() + patience_s
        while self._open:
            try:
                _check_reachable(self.uri)
                for run_id in sorted(self._open):
                    with contextlib.suppress(MlflowException):  # it was deleted meanwhile
                        self.end_run(run_id, status)
                return None
            except UserError as error:
                if time.monotonic() > deadline:
                    return str(error)
                time.sleep(0.5)
        return None

    def log_steps(self, run_id: str, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """(step, metrics) rows, in batches; a step logged twice keeps its last value."""
        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for step, row in rows for key, value in row.items()]
        for start in range(0, len(points), 500):
            self._client.log_batch(run_id, metrics=points[start : start + 500])

    def logged_steps(self, run_id: str, key: str) -> set[int]:
        """The steps at which a run already has a metric."""
        return {metric.step for metric in self._client.get_metric_history(run_id, key)}

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep a text as the run's artifact."""
        self._client.log_text(run_id, text, name)

    def log_dataset(self, run_id: str, table: Images) -> None:
        """The data set that a run used, with its digest and shape."""
        schema = {"images": [len(table.labels), *table.image_shape], "classes": list(table.class_names)}
        dataset = Dataset(
            name=table.source,
            digest=table.digest[:36],
            source_type="meanet",
            source=json.dumps({"uri": table.source, "sha256": table.digest}),
            schema=json.dumps(schema),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset)])

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Keep a local file as the run's artifact."""
        self._client.log_artifact(run_id, str(path), folder)

    # Registry

    def register(self, model: TrainedModel, run_id: str, exported: Path | None = None) -> int:
        """Store a model with its operating point as a new version, alias `candidate`; returns the version.

        Args:
            model: what to store.
            run_id: the run that made it.
            exported: a folder with its exported engines; torch alone if not given.

        The version is an MLflow pyfunc: `mlflow.pyfunc.load_model("models:/meanet@champion")` answers PNG or JPEG
        bytes in plain Python. It brings this library's code; its weights are safetensors.
        """
        point_id = policy_id(model.policy)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "package"
            data = artifact.save(model, Path(folder) / "model")
            if exported is not None:
                engines.copy(exported, data)
            _save_pyfunc(data, package)
            place = f"model-{secrets.token_hex(4)}"  # one run may make many versions
            self._client.log_artifacts(run_id, str(package), place)
        with contextlib.suppress(MlflowException):  # it exists
            self._client.create_registered_model(MODEL)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {"recipe": model.recipe.name, "operating_point": point_id, "data_digest": model.data_digest}
        version = self._client.create_model_version(MODEL, source, run_id, tags=tags)
        self._client.set_registered_model_alias(MODEL, CANDIDATE, version.version)
        return int(version.version)

    def version_of(self, reference: str) -> int:
        """The version that a number or an alias (`champion`) names.

        Raises:
            UserError: there is none.
        """
        try:
            if reference.isdigit():
                return int(self._client.get_model_version(MODEL, reference).version)
            return int(self._client.get_model_version_by_alias(MODEL, reference).version)
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            kind = "version" if reference.isdigit() else "alias"
            raise UserError(
                f"model {MODEL!r} has no {kind} {reference!r} in {self.uri}: it has {self._known()}; "
                "register a trained model with jobs.register FOLDER, and promote it with jobs.promote VERSION"
            ) from error

    def _known(self) -> str:
        versions = self._client.search_model_versions(f"name = '{MODEL}'")
        return ", ".join(f"version {v.version}" for v in versions) or "no versions"

    def download_to(self, version: int, folder: Path) -> Path:
        """The model's folder of a version, below `folder`: weights, what it says of itself, exported engines."""
        uri = self._client.get_model_version_download_uri(MODEL, str(version))
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=self.uri)
        return Path(path) / "data" / "model"

    def run_of(self, version: int) -> str:
        """The run that made a version."""
        return str(self._client.get_model_version(MODEL, str(version)).run_id)

    def check_champion(self, recipe: str, *, force: bool = False) -> ModelVersion | None:
        """The champion, if there is one.

        Raises:
            UserError: it is of another recipe and `force` is not set.
        """
        current = self._champion()
        if current and current.tags.get("recipe") != recipe and not force:
            raise UserError(
                f"the champion (version {current.version}) is of recipe {current.tags.get('recipe')!r} and the new one "
                f"of {recipe!r}: add --force to replace it all the same"
            )
        return current

    def promote(self, version: int, *, force: bool = False) -> int | None:
        """Make a version the champion; returns the version that it replaces, if any.

        Raises:
            UserError: the champion is of another recipe and `force` is not set.
        """
        ours = self._client.get_model_version(MODEL, str(version))
        current = self.check_champion(str(ours.tags.get("recipe")), force=force)
        if current and int(current.version) == version:
            return version
        if current:
            self._client.set_model_version_tag(MODEL, str(version), _PREVIOUS, current.version)
        self._client.set_registered_model_alias(MODEL, CHAMPION, str(version))
        return int(current.version) if current else None

    def rollback(self) -> tuple[int, int]:
        """Give the alias back to the version before; returns (from, to).

        Raises:
            UserError: there is no champion, or it replaced none.
        """
        current = self._champion()
        if current is None:
            raise UserError(f"model {MODEL!r} has no champion in {self.uri}: nothing to roll back")
        previous = current.tags.get(_PREVIOUS)
        if previous is None:
            raise UserError(f"version {current.version} replaced no other champion: promote a version by its number")
        self.version_of(previous)  # it may have been deleted
        self._client.set_registered_model_alias(MODEL, CHAMPION, previous)
        return int(current.version), int(previous)

    def _champion(self) -> ModelVersion | None:
        try:
            return self._client.get_model_version_by_alias(MODEL, CHAMPION)
        except MlflowException as error:
            if error.error_code in _MISSING:
                return None
            raise


_REQUIREMENTS: tuple[str, ...] = ("torch", "torchvision", "numpy", "pandas", "pillow", "pyarrow", "safetensors")
_REQUIREMENTS += ("pydantic", "mlflow-skinny", "onnxruntime")
"""What a registered model needs to answer."""


def _save_pyfunc(folder: Path, package: Path) -> None:
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "class_id"),
                ColSpec(DataType.string, "class_name"),
                ColSpec(DataType.string, "exit"),
                ColSpec(DataType.double, "confidence"),
                ColSpec(DataType.double, "entropy"),
            ]
        ),
    )
    code = package.parent / "meanet"
    shutil.copytree(Path(__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided", UserWarning)  # the signature is explicit
        mlflow.pyfunc.save_model(
            str(package),
            loader_module="meanet.runtime",
            data_path=str(folder),
            code_paths=[str(code)],
            signature=signature,
            model_config={"engine": "auto"},
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in _REQUIREMENTS],
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested parameters as dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sqlite_folder(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE)).absolute().parent if uri.startswith(_SQLITE) else None


def _check_reachable(uri: str) -> None:
    """Fail in seconds, not after MLflow's minutes of retries."""
    if folder := _sqlite_folder(uri):
        writable_directory(folder, "MLFLOW_TRACKING_URI")
        store = Path(uri.removeprefix(_SQLITE))
        if store.exists() and not os.access(store, os.W_OK):
            raise UserError(f"{store} cannot be written: change its permissions, or MLFLOW_TRACKING_URI")
    if urlsplit(uri).scheme in ("http", "https"):
        import httpx

        try:
            httpx.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
        except httpx.HTTPError as error:
            raise AwayError(
                f"the MLflow server {uri} does not answer ({type(error).__name__}): start it, or change "
                "MLFLOW_TRACKING_URI (unset it for the embedded store)"
            ) from error
