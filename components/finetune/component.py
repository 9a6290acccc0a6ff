"""The stage `finetune` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def finetune(
    config: str,
    latents: dsl.Input[dsl.Dataset],
    generator: dsl.Input[dsl.Model],
    denoiser: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Fine-tune the generator with the two memories: the method.

    Args:
        config: Section `finetune` of params.yaml, as JSON.
        latents: Latents of the real images, from encode.
        generator: Autoencoder and transformer, from pretrain.
        denoiser: Fine-tuned weights: only what was trained.
        metrics: What the stage measured.

    """
    from diffstill.task import run_task

    run_task("finetune", config, latents=latents, generator=generator, denoiser=denoiser, metrics=metrics)
