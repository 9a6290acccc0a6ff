"""What each stage takes and makes, and the chain: which step feeds which. Known without loading anything that computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffstill.config import Params


@dataclass(frozen=True)
class Stage:
    """The interface of a stage: the artifacts it takes and the one it makes, by parameter name."""

    output: Any
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    many: tuple[str, ...] = ()
    outside: Mapping[str, str] = field(default_factory=dict)
    """Folders that are no artifacts of ours: where given, each stands for the place that a field of the configuration names."""
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    on_device: bool = True
    sharded: bool = False
    """Whether the work can be cut: `shard` makes a share of it, `parts` gathers all shares."""
    in_ranks: bool = False
    """Whether `torchrun` may start it in several processes, of which the first one writes."""
    registers: bool = False
    """Whether it is given the registry of versions. Its effect is outside, so it is no step of a chain."""


STAGES: Mapping[str, Stage] = {
    "prepare": Stage("images", outside={"data": "location"}, on_device=False),
    "pretrain": Stage("generator", inputs=("images",), outside={"weights": "location", "autoencoder": "autoencoder"}),
    "encode": Stage("latents", inputs=("images", "generator"), sharded=True),
    "finetune": Stage("denoiser", inputs=("latents", "generator"), in_ranks=True),
    "sample": Stage("distilled", inputs=("generator",), optional=("denoiser",), sharded=True),
    "evaluate": Stage("scores", inputs=("images",), optional=("distilled",), options=("student",)),
    "report": Stage("report", inputs=("images", "denoiser", "distilled", "untuned"), many=("scores",), on_device=False),
    "publish": Stage("card", inputs=("distilled", "report"), flags=("force",), on_device=False, registers=True),
}


@dataclass(frozen=True)
class Step:
    """One run of a stage in the chain: `paths` are folder names under the artifact root."""

    name: str
    stage: str
    paths: Mapping[str, str | tuple[str, ...]]
    student: str | None = None

    def output(self, root: Path) -> Path:
        """Where this step writes."""
        return root / str(self.paths[STAGES[self.stage].output])


def chain(params: Params) -> list[Step]:
    """The steps of the whole chain in order, as dvc.yaml has them too."""
    students = params.evaluate.students
    judged = [(source, student) for source in ("distilled", "untuned") for student in students]
    return [
        Step("prepare", "prepare", {"images": "images"}),
        *(  # first, so that a baseline that cannot be drawn is known before the long stages
            Step(f"evaluate-real@{student}", "evaluate", {"images": "images", "scores": f"scores/real-{student}"}, student) for student in students
        ),
        Step("pretrain", "pretrain", {"images": "images", "generator": "generator"}),
        Step("encode", "encode", {"images": "images", "generator": "generator", "latents": "latents"}),
        Step("finetune", "finetune", {"latents": "latents", "generator": "generator", "denoiser": "denoiser"}),
        Step("sample", "sample", {"generator": "generator", "denoiser": "denoiser", "distilled": "distilled"}),
        Step("sample-untuned", "sample", {"generator": "generator", "distilled": "untuned"}),
        *(
            Step(
                f"evaluate@{source}-{student}", "evaluate", {"images": "images", "distilled": source, "scores": f"scores/{source}-{student}"}, student
            )
            for source, student in judged
        ),
        Step("report", "report", {**{name: name for name in STAGES["report"].inputs}, "scores": tuple(score_names(students)), "report": "report"}),
    ]


def score_names(students: Sequence[str]) -> list[str]:
    """The folders of scores that a report gathers."""
    return [f"scores/{source}-{student}" for source in ("distilled", "untuned", "real") for student in students]
