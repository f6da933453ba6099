"""What a run is: frozen, validated dataclasses. A recipe is a function that returns a whole one."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from meanet.errors import UserError

Gate = Literal["main_entropy", "max_softmax", "margin"]
Join = Literal["concat", "sum"]
Schedule = Literal["one_cycle", "steps"]
Payload = Literal["png", "raw"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are divided."""

    source: str = "digits"
    """Where the images come from, as a source's URI: `digits`."""
    validation_fraction: float = 0.2
    """Share of all images on which classes, thresholds and everything else are chosen, 0..1."""
    test_fraction: float = 0.26
    """Share of all images that are only reported on, 0..1."""
    crop_padding: int = 0
    """Random-crop padding while training, pixels on each side; 0 = none."""
    flip: bool = False
    """Random horizontal flips while training."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"data.{name} is {value}: it must lie between 0 and 1, both excluded")
        total = self.validation_fraction + self.test_fraction
        _require(total < 1, f"validation and test take {total:.2f} of the images: leave some to train on")
        _require(self.crop_padding >= 0, f"data.crop_padding is {self.crop_padding}: it must be 0 or more pixels")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a residual network: a row of basic blocks of one width."""

    width: int
    """Channels of its feature map."""
    blocks: int
    """Number of basic blocks (two 3x3 convolutions each)."""
    stride: int = 1
    """Stride of the first block: 2 halves height and width."""

    def __post_init__(self) -> None:
        _require(
            self.width > 0 and self.blocks > 0 and self.stride > 0,
            f"a stage of width {self.width}, {self.blocks} blocks and stride {self.stride}: each must be 1 or more",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The edge's three blocks and the cloud's network, all residual networks of basic blocks (MEANet, section III)."""

    stem_width: int = 16
    """Channels of the main block's 3x3 stem."""
    main: tuple[StageConfig, ...] = ()
    """Stages of the main block."""
    main_pool: int = 8
    """Side of the average pooling before the main exit, in cells of the last feature map."""
    adaptive_stem_width: int = 16
    """Channels of the adaptive block's 3x3 stem."""
    adaptive: tuple[StageConfig, ...] = ()
    """Stages of the adaptive block; its feature map must have the main block's shape."""
    extension: tuple[StageConfig, ...] = ()
    """Stages of the extension block."""
    join: Join = "concat"
    """How main and adaptive features meet: along channels, or added."""
    cloud_stem_width: int = 64
    """Channels of the cloud network's 3x3 stem."""
    cloud: tuple[StageConfig, ...] = ()
    """Stages of the cloud network."""

    def __post_init__(self) -> None:
        for name in ("main", "adaptive", "extension", "cloud"):
            _require(len(getattr(self, name)) > 0, f"model.{name} has no stages: give it one or more")
        _require(self.main_pool > 0, f"model.main_pool is {self.main_pool}: it must be 1 or more")
        ours, theirs = self.main[-1].width, self.adaptive[-1].width
        _require(
            ours == theirs, f"the adaptive block ends with {theirs} channels and the main block with {ours}: match"
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which classes are hard (MEANet, section IV: the lowest validation precision of the main exit)."""

    num_hard_classes: int = 5
    """H, the number of hard classes; 1 to C - 1."""

    def check(self, num_classes: int) -> None:
        """Raise UserError unless 1 <= H <= C - 1."""
        _require(
            0 < self.num_hard_classes < num_classes,
            f"split.num_hard_classes is {self.num_hard_classes} of {num_classes} classes: "
            f"choose 1 to {num_classes - 1}, so that both easy and hard classes exist",
        )


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """How one phase is trained: SGD with Nesterov momentum."""

    epochs: int = 10
    """Passes over the phase's samples."""
    batch_size: int = 128
    """Samples a step, over all workers together."""
    learning_rate: float = 0.1
    """Peak (one_cycle) or initial (steps) learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0..1."""
    schedule: Schedule = "one_cycle"
    """one_cycle: linear warm-up then cosine to zero; steps: times `gamma` at each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `steps` lowers the rate."""
    gamma: float = 0.1
    """Factor of `steps` at a milestone."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"epochs is {self.epochs}: train for 1 or more")
        _require(self.batch_size > 0, f"batch_size is {self.batch_size}: it must be 1 or more")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: it must be above 0")
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}: it must lie in 0..1, 1 excluded")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}: it must be 0 or more")
        _require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}: it must lie in 0..1")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """What a multiplication and a byte cost: names of profiles in `meanet.energy`."""

    device: str = "horowitz_45nm"
    """Device profile: joules per MAC."""
    link: str = "wifi"
    """Link profile: throughput and radio power."""
    payload: Payload = "png"
    """What is sent to the cloud: the PNG bytes, or raw pixels."""


@dataclass(frozen=True, kw_only=True)
class OperatingPointConfig:
    """How the operating point is chosen on validation."""

    max_accuracy_loss_vs_cloud: float = 0.005
    """How far accuracy may fall below cloud-only's, 0..1 (0.005 = half a point)."""
    confidence: float = 0.95
    """How sure validation must make us of that, 0.5..1 (one-sided; 0.5 takes the estimate as it is)."""

    def __post_init__(self) -> None:
        _require(0.5 <= self.confidence < 1, f"confidence is {self.confidence}: it must lie in 0.5..1, 1 excluded")
        loss = self.max_accuracy_loss_vs_cloud
        _require(0 <= loss <= 1, f"max_accuracy_loss_vs_cloud is {loss}: it is a share, 0..1 (0.005 = half a point)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: what `jobs.train RECIPE` does, every number of it."""

    name: str
    """The recipe's name; a checkpoint of one recipe is not another's."""
    seed: int = 0
    """Seeds the data's division, the weights and the order of samples."""
    data: DataConfig
    """Images."""
    model: ModelConfig
    """Networks."""
    split: SplitConfig
    """Hard classes."""
    main: PhaseConfig
    """Phase 1: the main block, all classes."""
    extension: PhaseConfig
    """Phase 2: adaptive and extension blocks, hard classes, main block frozen."""
    cloud: PhaseConfig
    """Phase 3: the cloud network, all classes."""
    energy: EnergyConfig = EnergyConfig()
    """Profiles of device and link."""
    operating_point: OperatingPointConfig = OperatingPointConfig()
    """The constraint of the operating point."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, f"seed is {self.seed}: it must lie in 0..{2**31 - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> "Recipe":
        """Rebuild a recipe that `to_dict` wrote.

        Raises:
            UserError: a field is missing, unknown or of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError  # here: training needs no pydantic

        try:
            return TypeAdapter(Recipe).validate_python(plain)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            raise UserError(f"a stored recipe cannot be read: {where}: {first['msg']}") from error

    def digest(self) -> str:
        """12 hex digits that change whenever any field does."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
