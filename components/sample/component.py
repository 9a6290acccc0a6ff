"""The stage `sample` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def sample(
    config: str,
    generator: dsl.Input[dsl.Model],
    distilled: dsl.Output[dsl.Dataset],
    sheet: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    denoiser: dsl.Input[dsl.Model] = None,
    parts: dsl.Input[list[dsl.Dataset]] = None,
    shard: str = "",
    step: str = "",
) -> None:
    """Draw the distilled images; without a denoiser those of the untuned generator.

    Args:
        config: Section `sample` of params.yaml, as JSON.
        generator: Autoencoder and transformer, from pretrain.
        distilled: Image folders, one per generation seed.
        sheet: Contact sheet, for the browser.
        metrics: What the stage measured.
        denoiser: Fine-tuned weights, from finetune.
        parts: What the shards made, to be gathered instead of made anew.
        shard: Make only this share, like 0/3; empty = everything.
        step: Name of the run in MLflow; empty = the name of the stage.

    """
    from diffstill.task import run_task

    run_task(
        "sample",
        config,
        generator=generator,
        distilled=distilled,
        sheet=sheet,
        metrics=metrics,
        denoiser=denoiser,
        parts=parts,
        shard=shard,
        step=step,
    )
