"""A model's whole life on a cluster, without a person: `python -m jobs.life digits`.

    ingest -> train -> evaluate -> tune -> register -> promote -> deploy -> classify

Each step is a job of its own, here or (--submit) submitted to the cluster; the first that fails ends the life with its
reason as the last line. Interrupted, the same command goes on after the last finished step; finished, it is a new life.
For cron: source the cluster's environment first (docs/operations.md).
"""

import json
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jobs import _cli, _progress
from jobs._alone import alone
from meanet.errors import UserError, exit_on_user_error
from meanet.onnx_export import Engines
from meanet.storage import check_writable, writable_directory, write_text

STEPS = ("ingest", "train", "evaluate", "tune", "register", "promote", "deploy", "classify")
_ROOT = Path(__file__).parent.parent
_HERE = ("deploy", "classify")
"""Steps that are no jobs of the cluster's: they speak to it over HTTP."""
_RAY_JOB = ("-m", "ray.scripts.scripts", "job")
_KEPT_LINES = 200


@dataclass(frozen=True)
class Flags:
    """Take a recipe from its images to answers over HTTP, each step a job."""

    recipe: _cli.RecipeFlags
    """The recipe's own fields; `--data.source` is what is ingested."""
    storage: str = "s3://meanet/life"
    """Folder for data, checkpoints, exits table and study: s3://bucket/path, or a path that every node can write."""
    output: Path = Path("outputs/life")
    """Folder of runs, which outlives jobs and which every node can write."""
    workers: int | None = None
    """Data-parallel workers; one per two CPUs of the cluster if not given."""
    space: str = "class_split"
    """What jobs.tune searches, from the trained model on."""
    trials: int = 8
    """Of jobs.tune."""
    engines: Engines = "onnx"
    """As jobs.register's. float32 by default: answers over HTTP are compared with the exits table."""
    port: int | None = None
    """Where the server answers, in place of the YAML's."""
    images: int | None = None
    """Test images that are classified; all if not given."""
    submit: bool = False
    """Submit the steps to the cluster (`ray job submit`), instead of running them here."""
    force: bool = False
    """Replace a champion of another recipe."""
    json: bool = False
    """Print the result as JSON."""


_OWN = {one.name for one in fields(Flags)} - {"recipe"}


@dataclass
class Record:
    """The content of life.json."""

    id: str
    words: list[str]
    """The command's, but for the recipe's name: other ones make another life."""
    recipe: str = ""
    """Name: another one makes another life, and so does none (a record of an earlier version)."""
    data: str = ""
    """Source that the first step wrote."""
    url: str = ""
    """Of the server."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Finished steps and their wall time."""
    result: dict[str, Any] = field(default_factory=dict)
    """What the last step found."""


def recipe_words(words: Sequence[str]) -> list[str]:
    """Those of a command's words that are flags of the recipe, but for the source: the steps are given them."""
    kept: list[str] = []
    keep = True
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
            keep = name not in _OWN and name != "data.source"
        if keep:
            kept.append(word)
    return kept


class Life:
    """The steps, each skipped if an earlier attempt has finished it."""

    def __init__(self, flags: Flags, words: Sequence[str], environment: _cli.Environment) -> None:
        if environment.dashboard is None or environment.ray_address is None or not environment.has_store:
            raise UserError(
                "a life needs RAY_ADDRESS, RAY_DASHBOARD_ADDRESS and MLFLOW_TRACKING_URI: source the cluster's "
                "environment (`make cluster` prints where it lies)"
            )
        self.flags, self._words = flags, list(words)
        self.output = writable_directory(flags.output)
        self._storage = check_writable(flags.storage).rstrip("/")
        self._log: Path | None = None

    def run(self) -> Record:
        """Run what is left.

        Raises:
            UserError: a step fails; its reason ends the message. Or another life is under way here.
        """
        with alone(self.output, "life"):
            self.record = self._begin()
            for number, step in enumerate(STEPS, 1):
                if step in self.record.seconds:
                    continue
                _progress.say(f"[{number}/{len(STEPS)}] {step}")
                started = time.perf_counter()
                getattr(self, f"_{step}")()
                self.record.seconds[step] = round(time.perf_counter() - started, 2)
                self._save()
        return self.record

    def _begin(self) -> Record:
        path = self.output / "life.json"
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            record = None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it to begin a new life there") from error
        asked = (self.flags.recipe.name, self._words)
        if record is not None and (record.recipe, record.words) == asked and STEPS[-1] not in record.seconds:
            _progress.say(f"going on with the interrupted life {record.id} (finished: {', '.join(record.seconds)})")
            return record
        identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return Record(identity, self._words, self.flags.recipe.name)

    def _save(self) -> None:
        write_text(json.dumps(asdict(self.record), indent=2), self.output / "life.json")

    # Steps

    @property
    def _place(self) -> str:
        return f"{self._storage}/{self.record.id}"

    @property
    def _run_folder(self) -> str:
        return str(self.output / "run")

    @property
    def _study_folder(self) -> str:
        return str(self.output / "study")

    @property
    def _recipe(self) -> list[str]:
        return [self.flags.recipe.name, "--data.source", self.record.data, *recipe_words(self._words)]

    @property
    def _workers(self) -> list[str]:
        return [] if self.flags.workers is None else ["--workers", str(self.flags.workers)]

    def _ingest(self) -> None:
        folder = f"{self._place}/data-{secrets.token_hex(2)}"  # half a set of an interrupted attempt is left alone
        said = self._step("ingest", self.flags.recipe.data.source, folder, "--json")
        self.record.data = _result(said)["sets"][0]["uri"]

    def _train(self) -> None:
        words = ("--output", self._run_folder, "--storage", f"{self._place}/checkpoints", *self._workers)
        self._step("train", *self._recipe, *words)

    def _evaluate(self) -> None:
        self._step("evaluate", self.flags.recipe.name, "--output", self._run_folder, "--exits", self._exits)

    @property
    def _exits(self) -> str:
        return f"{self._place}/exits.parquet"

    def _tune(self) -> None:
        words = ("--base", self._run_folder, "--output", self._study_folder, "--trials", str(self.flags.trials))
        self._step("tune", self.flags.space, *self._recipe, *words, "--results", f"{self._place}/study")

    def _register(self) -> None:
        self._step("register", self._study_folder, "--engines", self.flags.engines)

    def _promote(self) -> None:
        self._step("promote", "candidate", *(["--force"] if self.flags.force else []))

    def _deploy(self) -> None:
        words = [] if self.flags.port is None else ["--port", str(self.flags.port)]
        self.record.url = _result(self._step("deploy", "--json", *words))["url"]

    def _classify(self) -> None:
        words = [] if self.flags.images is None else ["--images", str(self.flags.images)]
        said = self._step("classify", self._study_folder, "--url", self.record.url, "--json", *words)
        self.record.result = _result(said)

    def _step(self, job: str, *words: str) -> list[str]:
        """Run a job, its lines shown as they come; returns the last of them.

        Raises:
            UserError: it fails.
        """
        command = ["-m", f"jobs.{job}", *words]
        submission = (
            f"{self.record.id}-{job}-{secrets.token_hex(2)}" if self.flags.submit and job not in _HERE else None
        )
        if submission is not None:
            options = ("--runtime-env", "jobs/runtime_env.yaml", "--submission-id", submission)
            command = [*_RAY_JOB, "submit", *options, "--", "python", *command]
        command = [sys.executable, *command]
        process = subprocess.Popen(  # noqa: S603
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stdout is not None, "it is a pipe"
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                _progress.say(f"    {line.rstrip()}")
            process.wait()
        finally:
            if process.poll() is None:  # interrupted: the step is, too
                self._stop(process, submission)
        if process.returncode:
            raise UserError(f"{job} failed: {reason(lines)}")
        return list(lines)

    @staticmethod
    def _stop(process: "subprocess.Popen[str]", submission: str | None) -> None:
        """End a step's process, and the job that it has submitted."""
        if submission is not None:
            stop = [sys.executable, *_RAY_JOB, "stop", submission]
            subprocess.run(stop, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
        process.terminate()
        process.wait()


def reason(lines: Sequence[str]) -> str:
    """Why a job failed, by what it said last."""
    said = [line for line in lines if line.strip()]
    errors = [line.partition("error: ")[2] for line in said if line.lstrip().startswith("error: ")]
    return (errors or said or ["it said nothing"])[-1]


def _result(lines: Sequence[str]) -> dict[str, Any]:
    """The JSON that a job printed."""
    for line in reversed(lines):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise UserError("the step printed no result: look at its lines above")


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@exit_on_user_error
def main() -> None:
    """Command-line entry."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    environment = _cli.Environment.read()
    flags = _cli.parse_recipe("life", Flags)
    record = Life(flags, sys.argv[2:], environment).run()
    if flags.json:
        print(json.dumps(asdict(record)))
        return
    result = record.result
    print(f"{record.url} serves; {result['images']} test images: accuracy {result['accuracy']:.2%}")
    print("seconds: " + ", ".join(f"{step} {seconds:.0f}" for step, seconds in record.seconds.items()))


if __name__ == "__main__":
    main()
