"""What a run is: frozen, validated dataclasses. A recipe is a function that returns a whole one."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from meanet.errors import UserError

Measure = Literal["main_entropy", "accepted_entropy", "max_softmax", "margin"]
Gate = Literal["main_entropy", "accepted_entropy", "max_softmax", "margin", "two_gate", "per_class"]
Join = Literal["concat", "sum"]
Schedule = Literal["one_cycle", "steps"]
Payload = str
"""What is sent to the cloud: `png`, `raw` (pixels), or `jpegQ` at a quality Q of 1 to 100 (`jpeg90`)."""
Tail = Literal["none", "amortised", "isolated"]
Precision = Literal["float32", "bfloat16"]
Feeding = Literal["auto", "resident", "streaming"]
Backbone = Literal["residual", "resnet18", "mobilenet_v2"]
CloudBackbone = Literal["residual", "resnet18", "resnet101"]
Stem = Literal["3x3", "7x7"]
SplitMethod = Literal["lowest_precision", "lowest_recall", "confusion_pairs", "random"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are divided."""

    source: str = "digits"
    """Where the images come from: `digits`, `cifar100[:FOLDER]`, `folder:PATH` or `parquet:PATH`; PATH may be s3://."""
    test_source: str | None = None
    """Where the test images come from, as `source`; a share of `source` is set aside if not given."""
    validation_fraction: float = 0.2
    """Share of `source` on which classes, thresholds and everything else are chosen, 0..1."""
    test_fraction: float = 0.26
    """Share of `source` that is only reported on, 0..1; unused where a test source is given (or `cifar100`'s own)."""
    image_column: str | None = None
    """Column of a Parquet source with the encoded images; the only such column if not given."""
    label_column: str | None = None
    """Column of a Parquet source with integer labels; `label`, `fine_label` or the only integer one if not given."""
    image_size: int | None = None
    """Side in pixels that images are brought to (shorter side scaled to 8/7 of it, centre cut out); None = their own,
    which must then be one size."""
    channels: Literal[1, 3] | None = None
    """1 = grey, 3 = RGB; what most images have if not given. Images of another mode count as bad."""
    max_bad_fraction: float = 0.01
    """Share of unusable images (undecodable, wrong mode, no label, ...) that may be skipped, 0..1; more is an error."""
    feed: Feeding = "auto"
    """resident: decoded once and kept in memory; streaming: decoded by Ray Data as needed; auto: by size."""
    crop_padding: int = 0
    """Random-crop padding while training, pixels on each side; 0 = none."""
    min_crop_area: float = 1.0
    """Random-resized-crop while training: smallest share of an image's area that is cut out, 0..1; 1 = none."""
    flip: bool = False
    """Random horizontal flips while training."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"data.{name} is {value}: it must lie between 0 and 1, both excluded")
        total = self.validation_fraction + self.test_fraction
        _require(total < 1, f"validation and test take {total:.2f} of the images: leave some to train on")
        _require(self.crop_padding >= 0, f"data.crop_padding is {self.crop_padding}: it must be 0 or more pixels")
        area, bad = self.min_crop_area, self.max_bad_fraction
        _require(0 < area <= 1, f"data.min_crop_area is {area}: it is a share, above 0 and at most 1 (1 = no cropping)")
        _require(0 <= bad <= 1, f"data.max_bad_fraction is {bad}: it is a share, 0..1")
        size = self.image_size
        _require(size is None or size > 0, f"data.image_size is {size}: it must be 1 or more pixels")

    @property
    def augmented(self) -> bool:
        """Whether training sees an image differently each time."""
        return self.crop_padding > 0 or self.flip or self.min_crop_area < 1


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
    """The edge's three blocks and the cloud's network (MEANet, section III)."""

    backbone: Backbone = "residual"
    """Main block: `residual` = stages of basic blocks as given below; else torchvision's network of that name."""
    pretrained: bool = False
    """Start the main block from torchvision's ImageNet weights (not with `residual`)."""
    stem: Stem = "3x3"
    """First convolution of the residual blocks: 3x3 (CIFAR), or 7x7 at stride 2 and a max-pool (ImageNet)."""
    stem_width: int = 16
    """Channels of the main block's stem."""
    main: tuple[StageConfig, ...] = ()
    """Stages of a residual main block."""
    main_pool: int = 8
    """Side of the average pooling before a residual main block's exit, in cells of the last feature map."""
    adaptive_stem_width: int = 16
    """Channels of the adaptive block's stem."""
    adaptive: tuple[StageConfig, ...] = ()
    """Stages of the adaptive block; its feature map must have the main block's shape. None for mobilenet_v2, which has
    an adaptive and an extension block of its own kind."""
    extension: tuple[StageConfig, ...] = ()
    """Stages of the extension block."""
    join: Join = "concat"
    """How main and adaptive features meet: along channels, or added."""
    cloud_backbone: CloudBackbone = "residual"
    """Cloud network: `residual` = stages of basic blocks as given below; else torchvision's network of that name."""
    cloud_pretrained: bool = False
    """Start the cloud network from torchvision's ImageNet weights (not with `residual`, nor with a 3x3 stem)."""
    cloud_stem: Stem = "3x3"
    """First convolution of the cloud network."""
    cloud_stem_width: int = 64
    """Channels of a residual cloud network's stem."""
    cloud: tuple[StageConfig, ...] = ()
    """Stages of a residual cloud network."""

    def __post_init__(self) -> None:
        own = self.backbone == "mobilenet_v2"
        needed = {
            "main": self.backbone == "residual",
            "adaptive": not own,
            "extension": not own,
            "cloud": self.cloud_backbone == "residual",
        }
        for name, wanted in needed.items():
            given = len(getattr(self, name)) > 0
            _require(given or not wanted, f"model.{name} has no stages: give it one or more")
            backbone = self.cloud_backbone if name == "cloud" else self.backbone
            _require(wanted or not given, f"model.{name} has stages, which {backbone} does not take: give none")
        _require(self.main_pool > 0, f"model.main_pool is {self.main_pool}: it must be 1 or more")
        self._check_pretrained()
        if self.backbone == "residual":
            ours, theirs = self.main[-1].width, self.adaptive[-1].width
            _require(
                ours == theirs, f"the adaptive block ends with {theirs} channels and the main block with {ours}: match"
            )

    def _check_pretrained(self) -> None:
        _require(
            not (self.pretrained and self.backbone == "residual"),
            "model.pretrained: a residual main block has no published weights; choose resnet18 or mobilenet_v2",
        )
        _require(
            not (self.cloud_pretrained and (self.cloud_backbone == "residual" or self.cloud_stem == "3x3")),
            "model.cloud_pretrained: published weights are those of resnet18 and resnet101 with the 7x7 stem",
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which classes are hard, chosen on a validation pass of the main exit (MEANet, section IV)."""

    num_hard_classes: int | None = None
    """H, the number of hard classes, 1 to C - 1; None = C / 2, as the authors chose."""
    method: SplitMethod = "lowest_precision"
    """lowest_precision: the paper's; lowest_recall; confusion_pairs: most confused pairs of classes stay together among
    the hard ones; random: a control."""

    def size(self, num_classes: int) -> int:
        """H for C classes.

        Raises:
            UserError: unless 1 <= H <= C - 1.
        """
        hard = num_classes // 2 if self.num_hard_classes is None else self.num_hard_classes
        _require(
            0 < hard < num_classes,
            f"split.num_hard_classes is {hard} of {num_classes} classes: "
            f"choose 1 to {num_classes - 1}, so that both easy and hard classes exist",
        )
        return hard


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """How one phase is trained: stochastic gradient descent with momentum."""

    epochs: int = 10
    """Passes over the phase's samples."""
    batch_size: int = 128
    """Samples a step, over all workers together."""
    learning_rate: float = 0.1
    """Peak (one_cycle) or initial (steps) learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """Nesterov's form of it."""
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
    max_steps: int | None = None
    """Steps an epoch at most, to try things out; None = all samples."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"epochs is {self.epochs}: train for 1 or more")
        _require(self.batch_size > 0, f"batch_size is {self.batch_size}: it must be 1 or more")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: it must be above 0")
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}: it must lie in 0..1, 1 excluded")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}: it must be 0 or more")
        _require(self.max_steps is None or self.max_steps > 0, f"max_steps is {self.max_steps}: it must be 1 or more")
        _require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}: it must lie in 0..1")


def jpeg_quality(payload: Payload) -> int | None:
    """Q of `jpegQ`; None for a payload without loss.

    Raises:
        UserError: there is no such payload.
    """
    if payload in ("png", "raw"):
        return None
    found = re.fullmatch(r"jpeg([1-9][0-9]?|100)", payload)
    if found is None:
        raise UserError(f"payload is {payload!r}: choose png, raw, or jpeg with a quality of 1 to 100 (jpeg90)")
    return int(found[1])


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """What computing and sending cost: names of profiles (meanet/profiles.yaml), and how to count."""

    device: str = "horowitz_45nm"
    """Device profile: joules per MAC, or watts and seconds."""
    link: str = "wifi"
    """Link profile: throughput and power while sending."""
    profiles: str | None = None
    """A YAML file of your own that adds devices and links, in the form of meanet/profiles.yaml; kept as its text."""
    tail: Tail = "none"
    """The radio's promotion and tail: none = not counted; isolated = each upload pays them whole; amortised = uploads
    share them, at `uploads_per_second`."""
    uploads_per_second: float = 1.0
    """Uploads a second, for `amortised`."""
    cloud_seconds: float = 0.0
    """What the cloud takes for an image, seconds; only latency counts it."""
    payload: Payload = "png"
    """What is sent to the cloud: png, raw (pixels), or jpegQ at a quality Q of 1 to 100 (jpeg90)."""

    def __post_init__(self) -> None:
        jpeg_quality(self.payload)
        rate, seconds = self.uploads_per_second, self.cloud_seconds
        _require(0 < rate < math.inf, f"energy.uploads_per_second is {rate}: it must be above 0")
        _require(0 <= seconds < math.inf, f"energy.cloud_seconds is {seconds}: it must be 0 or more")


def energy_config(plain: dict[str, Any]) -> EnergyConfig:
    """Rebuild what `dataclasses.asdict` made of an `EnergyConfig`.

    Raises:
        UserError: a field is unknown or senseless.
    """
    try:
        return EnergyConfig(**plain)
    except TypeError as error:
        raise UserError(f"stored energy profiles cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class OperatingPointConfig:
    """How the operating point is chosen on validation: the cheapest policy within the bounds on accuracy, or, where
    there are none, the most accurate one within the others."""

    max_accuracy_loss_vs_cloud: float | None = 0.005
    """How far accuracy may fall below cloud-only's, 0..1 (0.005 = half a point); None = as far as it likes."""
    min_accuracy: float | None = None
    """Accuracy at least, 0..1; None = any."""
    max_energy: float | None = None
    """Joules of the device an image at most; None = any."""
    max_cloud_share: float | None = None
    """Share of the images that may go to the cloud, 0..1; None = any."""
    max_latency: float | None = None
    """Expected seconds an image at most, compute and link; None = any."""
    confidence: float = 0.95
    """How sure validation must make us of the bounds on accuracy, 0.5..1 (one-sided; 0.5 takes the estimate)."""

    def __post_init__(self) -> None:
        _require(0.5 <= self.confidence < 1, f"confidence is {self.confidence}: it must lie in 0.5..1, 1 excluded")
        loss = self.max_accuracy_loss_vs_cloud
        _require(
            loss is None or 0 <= loss <= 1,
            f"max_accuracy_loss_vs_cloud is {loss}: it is a share, 0..1 (0.005 = half a point)",
        )
        for name in ("min_accuracy", "max_cloud_share"):
            share = getattr(self, name)
            _require(share is None or 0 <= share <= 1, f"{name} is {share}: it is a share, 0..1")
        for name, unit in (("max_energy", "joules"), ("max_latency", "seconds")):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}: it must be above 0 {unit} an image")

    @property
    def bounds(self) -> dict[str, float]:
        """The constraints that stand, by name."""
        names = ("max_accuracy_loss_vs_cloud", "min_accuracy", "max_energy", "max_cloud_share", "max_latency")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def bounds_accuracy(self) -> bool:
        """Whether accuracy is bounded, so that energy is what is made best."""
        return self.max_accuracy_loss_vs_cloud is not None or self.min_accuracy is not None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: what `jobs.train RECIPE` does, every number of it."""

    name: str
    """The recipe's name; a checkpoint of one recipe is not another's."""
    seed: int = 0
    """Seeds the data's division, the weights and the order of samples."""
    precision: Precision = "float32"
    """Of training's convolutions and products: bfloat16 = automatic mixed precision in channels-last layout."""
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
