"""The stage `pretrain` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def pretrain(
    config: str,
    images: dsl.Input[dsl.Dataset],
    generator: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    data_version: str = "",
) -> None:
    """Train a small generator on the training split, or take over a DiTPipeline folder.

    Args:
        config: Section `pretrain` of params.yaml, as JSON.
        images: Real images, from prepare.
        generator: Autoencoder and transformer, as diffusers opens them.
        metrics: What the stage measured.
        data_version: What tells pretrained weights from others at the same location, so that the cache does not take one for the other; empty = the location does.

    """
    from diffstill.task import run_task

    run_task("pretrain", config, images=images, generator=generator, metrics=metrics, data_version=data_version)
