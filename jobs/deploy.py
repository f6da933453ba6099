"""Deploy Serve by a committed YAML and wait until it answers: `python -m jobs.deploy` (`serve deploy` returns at once).

The cluster's dashboard is in RAY_DASHBOARD_ADDRESS (or RAY_API_SERVER_ADDRESS); MLFLOW_TRACKING_URI takes the place of
the file's `tracking_uri`. Deployed already, the same file changes nothing, and a new champion is waited for.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from jobs import _cli, _progress
from meanet.errors import UserError, exit_on_user_error, first_line
from meanet.tracking import Tracker

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

CONFIG = Path(__file__).parent.parent / "serve_apps" / "meanet.yaml"
_POLL_S = 0.5
_LOOK_S = 30.0
"""How long the dashboard may take to say how things are; a deployment may take all that is left of `--wait-s`."""


@dataclass(frozen=True)
class Flags:
    """Deploy the application, wait until all its replicas run and serve the version asked for."""

    config: Path = CONFIG
    """Serve's YAML."""
    port: int | None = None
    """Where HTTP is answered, in place of the file's; one that Serve listens on already stays."""
    wait_s: float = 180.0
    """How long it may take, s."""
    json: bool = False
    """Print the result as JSON."""


def read_config(path: Path, tracking_uri: str | None, port: int | None) -> dict[str, Any]:
    """Serve's YAML, with the store and the port that were asked for.

    Raises:
        UserError: it cannot be read, or holds other than one application.
    """
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        (application,) = config["applications"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no Serve config of one application ({error}): see serve_apps/meanet.yaml"
        ) from error
    if tracking_uri is not None:
        application.setdefault("args", {})["tracking_uri"] = tracking_uri
    if port is not None:
        config.setdefault("http_options", {})["port"] = port
    return config


class Deployment:
    """An application on a cluster, by its dashboard's REST API."""

    def __init__(self, dashboard: str, config: dict[str, Any], wait_s: float) -> None:
        (self._application,) = config["applications"]
        self.name: str = self._application["name"]
        self._dashboard, self._config = dashboard, config
        self._deadline, self._wait_s = time.monotonic() + wait_s, wait_s
        with _token_wanted(dashboard):
            try:
                self._client = _client(dashboard, lambda: self._deadline - time.monotonic())
            except (OSError, RuntimeError, ValueError) as error:  # those of requests are OSErrors
                raise UserError(
                    f"no Ray dashboard answers at {dashboard} ({first_line(error)}): start the cluster, or "
                    "correct RAY_DASHBOARD_ADDRESS"
                ) from error

    def run(self) -> str:
        """Deploy and wait; returns the URL.

        Raises:
            UserError: it is refused, fails, or takes too long; the message ends with Serve's reason.
        """
        try:
            self._outwait(lambda: self._client.deploy_applications(self._config), OSError)
        except RuntimeError as error:
            raise UserError(f"Serve refuses the config: {_last_line(str(error))}") from error
        details, status = {}, ""
        while status != "RUNNING":
            details = self._details()
            found = details["applications"].get(self.name, {})
            if found.get("status", "") != status:
                status = found.get("status", "")
                _progress.say(f"  {self.name} is {status}")
            if status == "DEPLOY_FAILED":
                raise UserError(f"{self.name} could not be deployed: {_why(found)}")
            self._check_time(f"{self.name} is {status or 'unknown'}: {_why(found)}")
        options = details["http_options"]
        return f"http://{options['host']}:{options['port']}"

    def _details(self) -> dict[str, Any]:
        found: dict[str, Any] = self._outwait(self._client.get_serve_details, OSError, RuntimeError)  # a busy dashboard
        return found

    def _outwait(self, ask: Callable[[], Any], *passing: type[Exception]) -> Any:
        """The dashboard's answer, asked again after errors that pass, while there is time; to deploy twice is to deploy
        once."""
        while True:
            try:
                with _token_wanted(self._dashboard):
                    return ask()
            except passing as error:
                self._check_time(f"the dashboard does not answer ({first_line(error)})")

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self._deadline:
            raise UserError(f"not deployed after {self._wait_s:.0f} s: {what}")
        time.sleep(_POLL_S)

    def wait_for_version(self, url: str, version: int) -> None:
        """Wait until every replica serves a version.

        Raises:
            UserError: it is refused, or takes too long.
        """
        while True:
            known = _version_of(url)
            reason = known.get("refused", {}).get(str(version))
            if reason is not None:
                raise UserError(f"version {version} is refused: {reason}")
            if known.get("version") == version and known.get("phase") == "idle":
                return
            self._check_time(f"{url} serves version {known.get('version', 'unknown')}, and not {version} yet")


def _client(dashboard: str, left_s: Callable[[], float]) -> "ServeSubmissionClient":
    """Ray's own, which brings the token along, but none of its requests waits for ever."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    class Client(ServeSubmissionClient):
        def _do_request(self, method: str, *args: Any, **kwargs: Any) -> Any:
            left = max(1.0, left_s())
            return super()._do_request(method, *args, timeout=left if method == "PUT" else min(_LOOK_S, left), **kwargs)

    return Client(dashboard)


@contextlib.contextmanager
def _token_wanted(dashboard: str) -> Iterator[None]:
    """The remedy, where the dashboard lets nobody in who has not its token.

    Raises:
        UserError: it does not let us in.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"the dashboard at {dashboard} wants the cluster's token ({error.message.splitlines()[0]}): set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that its nodes were started with"
        ) from error


def _version_of(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/v1/version", timeout=10)
    except httpx.HTTPError:
        return {}
    known: dict[str, Any] = answer.json() if answer.is_success else {}
    return known


def _why(application: dict[str, Any]) -> str:
    """What Serve says of an application that does not run, as one line: its unhealthy deployments know best."""
    ill = [one for one in application.get("deployments", {}).values() if one.get("status") != "HEALTHY"]
    messages = [one.get("message", "") for one in ill]
    found = next((message for message in messages if message.strip()), application.get("message", ""))
    return _last_line(found) or "Serve says nothing about it"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    environment = _cli.Environment.read()
    flags = _cli.parse("deploy", Flags)
    if environment.dashboard is None:
        raise UserError("there is no dashboard to deploy to: set RAY_DASHBOARD_ADDRESS, such as http://127.0.0.1:8265")
    own = environment.tracking_uri if environment.has_store else None
    config = read_config(flags.config, own, flags.port)
    arguments = config["applications"][0]["args"]
    tracker = Tracker(arguments["tracking_uri"])
    tracker.version_of(str(arguments.get("version", "champion")))  # said before anything is changed
    deployment = Deployment(environment.dashboard, config, flags.wait_s)
    url = deployment.run()
    version = tracker.version_of(str(arguments.get("version", "champion")))
    deployment.wait_for_version(url, version)
    if flags.json:
        print(json.dumps({"application": deployment.name, "url": url, "version": version}))
    else:
        print(f"{deployment.name} version {version} answers at {url}; `serve shutdown` ends it")


if __name__ == "__main__":
    main()
