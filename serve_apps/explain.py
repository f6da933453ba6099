"""Why an image was answered as it was: what each block says of it, and the rule that chose.

Computes the edge's blocks again.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from meanet.routing import Exit, Policy, complexity, is_hard, limits, waits
from meanet.runtime import Images
from serve_apps.served import Served

_WORDS = {"main_entropy": "entropy", "accepted_entropy": "entropy", "max_softmax": "doubt (1 - max softmax)"}
_WORDS |= {"margin": "doubt (1 - margin)"}


@dataclass(frozen=True)
class Why:
    """One image under one policy."""

    main_class: str
    """What the main exit predicts."""
    main_confidence: float
    """0..1."""
    entropy: float | None
    """Of the main exit, nats; null where its logits are not finite."""
    hard: bool
    """Whether that class is one of the hard ones in use."""
    edge_class: str
    """The edge's best answer, which goes out if the cloud cannot be had."""
    edge_confidence: float
    """0..1."""
    extension_ran: bool
    """For the edge's best answer."""
    measure: str
    """Which complexity the gate compares."""
    complexity: float | None
    """Of this image; null where it is not finite, or the extension's own, which is not kept."""
    threshold: float | None
    """That it is compared with; null = never to the cloud."""
    exit: str
    """Where the rule sends it: main, extension or cloud."""
    steps: list[str]
    """The rule in words, step by step."""

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def explain(served: Served, image: Images, policy: Policy) -> Why:
    """What the rule makes of one (H, W, C) image."""
    names = served.model.class_names
    answers, pending = served.runtime.run(image[None], policy)
    main = pending.main
    alone, _ = served.runtime.run(image[None], replace(policy, edge_only=True))
    hard = bool(is_hard(main, policy)[0])
    by_answer = hard and waits(policy)
    measure = policy.measures[-1 if hard else 0] if policy.gate == "two_gate" else policy.measures[0]
    threshold = _finite(limits(main, np.array([hard]), policy)[0])
    why = Why(
        main_class=names[int(main.pred[0])],
        main_confidence=float(main.confidence[0]),
        entropy=_finite(main.entropy[0]),
        hard=hard,
        edge_class=names[int(alone.pred[0])],
        edge_confidence=float(alone.confidence[0]),
        extension_ran=bool(alone.extended[0]),
        measure=measure,
        complexity=None if by_answer else _finite(complexity(main, measure)[0]),
        threshold=threshold,
        exit=Exit(int(answers.exit[0])).label,
        steps=[],
    )
    why.steps.extend(_steps(why, edge_only=policy.edge_only, by_answer=by_answer))
    return why


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _steps(why: Why, *, edge_only: bool, by_answer: bool) -> list[str]:
    return [
        f"The main block says {why.main_class} with a confidence of {why.main_confidence:.1%}.",
        _gate(why, edge_only=edge_only, by_answer=by_answer),
        *_edge(why),
    ]


def _gate(why: Why, *, edge_only: bool, by_answer: bool) -> str:
    if edge_only:
        return "Nothing of this request may leave the edge."
    if why.threshold is None:
        return "The policy sends no such image to the cloud."
    if why.complexity is None and not by_answer:
        return "The main block's numbers are not finite: complex, to the cloud."
    what = f"Its {_WORDS[why.measure]} of {why.complexity:.4f}" if why.complexity is not None else ""
    what = what or "The entropy of the answer that the edge accepts"
    if why.exit == "cloud":
        return f"{what} is above the threshold of {why.threshold:.4f}: complex, to the cloud."
    return f"{what} is within the threshold of {why.threshold:.4f}: it stays on the edge."


def _edge(why: Why) -> list[str]:
    best = f"{why.edge_class} with a confidence of {why.edge_confidence:.1%}"
    if why.exit == "cloud":
        return [f"Should the cloud not answer, the edge's best goes out: {best}."]
    if not why.hard:
        return [f"{why.main_class} is an easy class: the main block's answer stands."]
    kept = "the extension block's answer" if why.edge_class != why.main_class else "the answer"
    return [f"{why.main_class} is a hard class: the extension block ran, and {kept} is {best}."]
