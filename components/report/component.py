"""The stage `report` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).cpu, install_kfp_package=False)
def report(
    config: str,
    images: dsl.Input[dsl.Dataset],
    denoiser: dsl.Input[dsl.Model],
    distilled: dsl.Input[dsl.Dataset],
    untuned: dsl.Input[dsl.Dataset],
    distilled_scores: dsl.Input[list[dsl.Dataset]],
    untuned_scores: dsl.Input[list[dsl.Dataset]],
    real_scores: dsl.Input[list[dsl.Dataset]],
    report: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Gather all scores into numbers, figures and one page.

    Args:
        config: Section `report` of params.yaml, as JSON.
        images: Real images, from prepare.
        denoiser: Fine-tuned weights, from finetune.
        distilled: Distilled images, from sample.
        untuned: Images of the untuned generator, from sample without denoiser.
        distilled_scores: Student runs on the distilled set.
        untuned_scores: Student runs on the images of the untuned generator.
        real_scores: Student runs on real images.
        report: Tables, figures and the page, as one folder.
        page: The page, for the browser.
        summary: The table, for the browser.
        metrics: What the stage measured.

    """
    from diffstill.task import run_task

    run_task(
        "report",
        config,
        images=images,
        denoiser=denoiser,
        distilled=distilled,
        untuned=untuned,
        scores=[*distilled_scores, *untuned_scores, *real_scores],
        report=report,
        page=page,
        summary=summary,
        metrics=metrics,
    )
