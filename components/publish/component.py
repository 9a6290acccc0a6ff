"""The stage `publish` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).cpu, install_kfp_package=False)
def publish(
    config: str,
    distilled: dsl.Input[dsl.Dataset],
    report: dsl.Input[dsl.Artifact],
    card: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Make a version of the distilled set in MLflow's registry, unless the gate refuses it.

    Args:
        config: Section `publish` of params.yaml, as JSON.
        distilled: Distilled images, from sample.
        report: What they are worth, from report.
        card: The card, the lineage and contact sheets, as one folder.
        summary: The card, for the browser.
        metrics: What the stage measured.

    """
    from diffstill.task import run_task

    run_task("publish", config, distilled=distilled, report=report, card=card, summary=summary, metrics=metrics)
