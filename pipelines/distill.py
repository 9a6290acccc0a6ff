"""The whole chain as one pipeline, from the preflight to the report and the version in the registry, and the arguments of a run.

Loops are one level deep and short, no loop stands in an exit handler, and nothing is imported: backends fail on these.
"""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.constants import WORKSPACE_MOUNT_PATH
from kubernetes.utils.quantity import parse_quantity

from components.encode.component import encode as encode_images
from components.evaluate.component import evaluate as train_students
from components.finetune.component import finetune as finetune_generator
from components.images import Images
from components.preflight.component import preflight as check_needs
from components.prepare.component import prepare as prepare_images
from components.pretrain.component import pretrain as make_generator
from components.publish.component import publish as make_version
from components.report.component import report as gather_scores
from components.sample.component import sample as draw_images
from diffstill.config import Params, PublishConfig
from diffstill.errors import DiffstillError
from pipelines.placement import Placement
from pipelines.settings import MAX_ITERATIONS, InfraConfig, Settings, ShardsConfig

NAME = "diffstill-distill"
DESCRIPTION = "Distil a labelled image set into a tiny synthetic one by diffusion with a self-adaptive memory, and judge it by students."


class Made(NamedTuple):
    """What the pipeline gives: every artifact of the chain. The card is not among them: no pipeline gives out what a branch makes."""

    images: dsl.Dataset
    generator: dsl.Model
    latents: dsl.Dataset
    denoiser: dsl.Model
    distilled: dsl.Dataset
    untuned: dsl.Dataset
    distilled_scores: list[dsl.Dataset]
    untuned_scores: list[dsl.Dataset]
    real_scores: list[dsl.Dataset]
    report: dsl.Artifact


def build(infra: InfraConfig, images: Images, *, caching: bool = True) -> BaseComponent:
    """The pipeline, each task placed as `infra` says, in `images`; without `caching` every task runs anew each time."""
    place = Placement(infra, images, caching)

    @dsl.pipeline(name=NAME, display_name="diffstill: distil and judge", description=DESCRIPTION)
    def distill(
        prepare: str,
        pretrain: str,
        encode: str,
        finetune: str,
        sample: str,
        evaluate: str,
        report: str,
        students: list[str],
        encode_shards: list[str],
        sample_shards: list[str],
        params: str,
        needs: str,
        data_version: str = "",
        weights_version: str = "",
        publish: str = "",
    ) -> Made:
        """Distil and judge.

        Args:
            prepare: Section `prepare` of params.yaml as JSON.
            pretrain: Section `pretrain` of params.yaml as JSON.
            encode: Section `encode` of params.yaml as JSON.
            finetune: Section `finetune` of params.yaml as JSON.
            sample: Section `sample` of params.yaml as JSON.
            evaluate: Section `evaluate` of params.yaml as JSON.
            report: Section `report` of params.yaml as JSON.
            students: The students of section `evaluate`, one iteration each.
            encode_shards: The shards that encoding is cut into, like 0/2 and 1/2.
            sample_shards: The shards that sampling is cut into.
            params: The whole of params.yaml as JSON, for the record.
            needs: What the preflight checks, as JSON.
            data_version: What tells the data from other data at the same location; empty = the location does.
            weights_version: The same of pretrained weights.
            publish: Section `publish` of params.yaml as JSON; empty = make no version in the registry.

        """
        checked = place(check_needs(needs=needs, params=params), "preflight")
        images = place(prepare_images(config=prepare, data_version=data_version).after(checked), "prepare").outputs["images"]

        with dsl.ParallelFor(
            students, name="each-student-on-real"
        ) as student:  # before the long stages, so that a baseline that cannot be drawn is known early
            real = place(
                train_students(config=evaluate, images=images, student=student, step=f"evaluate-real@{student}"), "evaluate", "evaluate-real"
            )

        generator = place(make_generator(config=pretrain, images=images, data_version=weights_version), "pretrain").outputs["generator"]

        encoding = {"config": encode, "images": images, "generator": generator}
        with dsl.ParallelFor(encode_shards, name="each-shard-of-latents") as shard:
            part = place(encode_images(**encoding, shard=shard), "encode", "encode-shard").outputs["latents"]
        latents = place(encode_images(**encoding, parts=dsl.Collected(part)), "gather", "encode").outputs["latents"]

        denoiser = place(finetune_generator(config=finetune, latents=latents, generator=generator), "finetune").outputs["denoiser"]

        tuning = {"config": sample, "generator": generator, "denoiser": denoiser}
        plain = {"config": sample, "generator": generator, "step": "sample-untuned"}
        with dsl.ParallelFor(sample_shards, name="each-shard-of-images") as shard:
            tuned_part = place(draw_images(**tuning, shard=shard), "sample", "sample-shard").outputs["distilled"]
            plain_part = place(draw_images(**plain, shard=shard), "sample", "sample-untuned-shard").outputs["distilled"]
        distilled = place(draw_images(**tuning, parts=dsl.Collected(tuned_part)), "gather", "sample").outputs["distilled"]
        untuned = place(draw_images(**plain, parts=dsl.Collected(plain_part)), "gather", "sample-untuned").outputs["distilled"]

        judging = {"config": evaluate, "images": images}
        with dsl.ParallelFor(students, name="each-student-on-drawn") as student:
            cells = {
                f"{source}_scores": place(
                    train_students(**judging, distilled=made, student=student, step=f"evaluate@{source}-{student}"), "evaluate", f"evaluate-{source}"
                )
                for source, made in (("distilled", distilled), ("untuned", untuned))
            }
        cells["real_scores"] = real

        def scores() -> dict[str, dsl.Collected]:
            """Anew for each use, because the compiler changes what it is given."""
            return {name: dsl.Collected(cell.outputs["scores"]) for name, cell in cells.items()}

        told = place(gather_scores(config=report, images=images, denoiser=denoiser, distilled=distilled, untuned=untuned, **scores()), "report")
        with dsl.If(publish != "", name="if-published"):
            place(make_version(config=publish, distilled=distilled, report=told.outputs["report"]), "publish")
        single = {"images": images, "generator": generator, "latents": latents, "denoiser": denoiser, "distilled": distilled, "untuned": untuned}
        return Made(**single, **scores(), report=told.outputs["report"])

    return distill


def arguments(
    params: Params,
    settings: Settings | None,
    shards: ShardsConfig,
    data_version: str = "",
    weights_version: str = "",
    *,
    publish: bool = False,
) -> Mapping[str, str | list[str]]:
    """The arguments of a run: one JSON text per section, because Kubeflow turns integers in mappings into floats.

    Raises `DiffstillError` on what a pipeline cannot do. Without `settings` the preflight needs MLflow if the run is to `publish`, and else nothing.
    """
    if params.sample.classes is not None:
        raise DiffstillError(
            "`sample.classes` is for `diffstill sample` alone, a pipeline judges all classes; set it to null, or use `prepare.classes`"
        )
    students = list(params.evaluate.students)
    if len(students) > MAX_ITERATIONS:
        raise DiffstillError(f"`evaluate.students` lists {len(students)} networks, a loop of the pipeline takes {MAX_ITERATIONS}; split the run")
    if odd := next((name for name in students if literal(json.dumps(name)) != json.dumps(name)), None):
        raise DiffstillError(f"`evaluate.students` names {odd!r}, of which Kubeflow would read a part as its own placeholder; correct the name")
    return {
        **{name: literal(params.section(name).canonical()) for name in Params.STAGES},
        **({} if publish else {"publish": ""}),
        "students": students,
        "encode_shards": [f"{index}/{shards.encode}" for index in range(shards.encode)],
        "sample_shards": [f"{index}/{shards.sample}" for index in range(shards.sample)],
        "params": literal(params.canonical()),
        "needs": literal(json.dumps(_needs(settings, params.publish if publish else None), sort_keys=True)),
        "data_version": data_version,
        "weights_version": weights_version,
    }


def literal(text: str) -> str:
    """The same JSON, written so that nobody on its way to a task takes a part of it for his own.

    Kubeflow reads `{{$...}}` and `[[RunUUID]]`, Argo `{{...}}`, Kubernetes `$(NAME)`, kfp's local runner the path of its workspace. None of these can stand in JSON but within a text.
    """
    text = text.replace("$", r"\u0024").replace("{{", r"{\u007b").replace(WORKSPACE_MOUNT_PATH, WORKSPACE_MOUNT_PATH.replace("k", r"\u006b"))
    return re.sub(r"\[\[(?=[A-Z])", r"\\u005b[", text)


def _needs(settings: Settings | None, publish: PublishConfig | None) -> dict[str, object]:
    """What the preflight must find: what its own pod is promised, which is that of fine-tuning, and the services of all pods."""
    if settings is None:
        return {"mlflow": True} if publish else {}
    infra, resources = settings.infra, settings.infra.resources["finetune"]
    root = settings.cluster.pipeline_root or ""
    return {
        "gpus": resources.gpus,
        "disk_gib": infra.disk_gib,
        "shared_memory_gib": float(parse_quantity(resources.shared_memory) / 2**30) if resources.shared_memory else 0.0,
        "environment": sorted(infra.variables),
        "store": infra.store or (publish and publish.store) or (root if root.startswith("s3://") else None),
        "mlflow": bool(publish) or "MLFLOW_TRACKING_URI" in infra.variables,
    }
