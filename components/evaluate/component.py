"""The stage `evaluate` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def evaluate(
    config: str,
    images: dsl.Input[dsl.Dataset],
    scores: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    distilled: dsl.Input[dsl.Dataset] = None,
    student: str = "",
    step: str = "",
) -> None:
    """Train students on a distilled set and test them on real images; without a distilled set, on real baselines.

    Args:
        config: Section `evaluate` of params.yaml, as JSON.
        images: Real images, from prepare.
        scores: Student runs.
        metrics: What the stage measured.
        distilled: Distilled images, from sample.
        student: One of `evaluate.students`; empty = all.
        step: Name of the run in MLflow; empty = the name of the stage.

    """
    from diffstill.task import run_task

    run_task("evaluate", config, images=images, scores=scores, metrics=metrics, distilled=distilled, student=student, step=step)
