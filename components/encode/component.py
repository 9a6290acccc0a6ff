"""The stage `encode` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def encode(
    config: str,
    images: dsl.Input[dsl.Dataset],
    generator: dsl.Input[dsl.Model],
    latents: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    parts: dsl.Input[list[dsl.Dataset]] = None,
    shard: str = "",
) -> None:
    """Encode the real images into latents, once.

    Args:
        config: Section `encode` of params.yaml, as JSON.
        images: Real images, from prepare.
        generator: Autoencoder and transformer, from pretrain.
        latents: Posterior moments of the training and val images.
        metrics: What the stage measured.
        parts: What the shards made, to be gathered instead of made anew.
        shard: Make only this share, like 0/3; empty = everything.

    """
    from diffstill.task import run_task

    run_task("encode", config, images=images, generator=generator, latents=latents, metrics=metrics, parts=parts, shard=shard)
