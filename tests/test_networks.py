"""The DiT and the autoencoder: sharing, saving, DiffFit, and the folder that diffusers opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chains import contents
from diffstill.config import Params, PretrainConfig
from diffstill.errors import DiffstillError
from diffstill.networks import (
    LABEL_ROWS,
    LABEL_TABLE,
    DiTPipeline,
    DiTTransformer2DModel,
    Generator,
    add_labels,
    add_scales,
    apply_delta,
    build_scheduler,
    build_transformer,
    build_vae,
    choose_trainable,
    fold_scales,
    load_generator,
    moved_labels,
    save_generator,
    share_embedder,
    take_delta,
)

PRETRAIN = Params.model_validate_json(
    json.dumps({"pretrain": {"vae": {"channels": [16, 16]}, "dit": {"layers": 2, "heads": 2, "head_dim": 16, "patch": 1}}})
).pretrain
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    made = Generator(build_transformer(PRETRAIN, 3, 4), build_vae(PRETRAIN, 1, 8), SCHEDULE)
    with torch.no_grad():  # adaLN-Zero starts at zero output; give every weight a say
        for weight in made.transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, 4, 4, generator=draws), torch.tensor([0, 1, 500, 900, 999]), torch.tensor([0, 1, 2, 3, 0])


@torch.no_grad()
def test_saved_and_loaded_predicts_the_same(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    again = load_generator(tmp_path)
    assert torch.equal(generator.predict(*batch()), again.predict(*batch()))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(generator.encode(images)[0], again.encode(images)[0])
    assert again.null_label == 3
    assert again.latent_shape == (4, 4, 4)
    assert torch.equal(generator.alphas_cumprod(), again.alphas_cumprod())


@torch.no_grad()
def test_the_stock_pipeline_opens_the_folder_and_samples(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 2], guidance_scale=1, num_inference_steps=3).images
    assert [(image.size, image.mode) for image in images] == [((8, 8), "L")] * 2
    assert pipeline.get_label_ids(["c"]) == [2]
    assert torch.equal(pipeline.transformer(batch()[0], timestep=batch()[1], class_labels=batch()[2]).sample, generator.predict(*batch()))


def test_the_schedule_is_that_of_the_generator(generator: Generator) -> None:
    other = replace(generator, scheduler={"num_train_timesteps": 40, "beta_start": 1e-3, "beta_end": 0.3, "beta_schedule": "linear"})
    torch.testing.assert_close(other.alphas_cumprod(), torch.cumprod(1 - torch.linspace(1e-3, 0.3, 40), dim=0))


@torch.no_grad()
def test_latents_are_scaled_for_the_transformer_and_back_for_the_decoder(generator: Generator) -> None:
    mean, std = generator.encode(torch.randn(2, 1, 8, 8))
    posterior = generator.vae.encode(torch.zeros(1, 1, 8, 8)).latent_dist
    torch.testing.assert_close(generator.encode(torch.zeros(1, 1, 8, 8))[1], (0.5 * posterior.logvar).exp())
    assert mean.shape == std.shape == (2, 4, 4, 4)
    scaling = generator.vae.config.scaling_factor
    assert scaling != 1
    torch.testing.assert_close(generator.decode(mean * scaling), generator.vae.decode(mean).sample)


def test_images_are_decoded_some_at_a_time(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> Tensor:
        noise = [torch.Generator().manual_seed(number) for number in range(5)]
        return generator.draw([0, 1, 2, 0, 1], noise, sampler="ddim", steps=2, guidance=1.0)

    whole = drawn()
    monkeypatch.setattr("diffstill.networks.DECODED_AT_ONCE", 2)
    torch.testing.assert_close(drawn(), whole)


def test_no_paths_in_the_saved_folder_and_saved_again_it_is_the_same(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "one", ["a", "b", "c"])
    save_generator(load_generator(tmp_path / "one"), tmp_path / "two", ["a", "b", "c"])
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_one_embedder_is_shared_and_counts_once(generator: Generator) -> None:
    embedders = {id(block.norm1.emb) for block in generator.transformer.transformer_blocks}
    assert len(embedders) == 1
    dim = 32
    embedder = 256 * dim + dim + dim * dim + dim + 4 * dim
    block = 4 * (dim * dim + dim) + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim) + (dim * 6 * dim + 6 * dim)
    ends = (4 * dim + dim) + (dim * 2 * dim + 2 * dim) + (dim * 4 + 4)
    assert sum(weight.numel() for weight in generator.transformer.parameters()) == embedder + 2 * block + ends


def test_a_fresh_transformer_predicts_no_noise_and_every_block_passes_its_input_on() -> None:
    """adaLN-Zero: all gates and the output are closed at first, everything else is open."""
    fresh = build_transformer(PRETRAIN, 3, 4)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in fresh.transformer_blocks:
        block.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    x, t, labels = batch()
    assert not fresh(x, timestep=t, class_labels=labels).sample.any()
    assert len(seen) == 2
    assert all(torch.equal(before, after) and before.any() for before, after in seen)
    assert dict(fresh.named_parameters())[LABEL_TABLE].std().item() == pytest.approx(1, abs=0.2)


def test_labels_are_never_dropped_behind_our_back(generator: Generator) -> None:
    assert not generator.transformer.training
    first, second = generator.predict(*batch()), generator.predict(*batch())
    assert torch.equal(first, second)


def test_frequency_shift_changes_only_the_timestep_frequencies(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    embedder = load_generator(tmp_path, frequency_shift=0.0).transformer.transformer_blocks[0].norm1.emb.time_proj
    t = torch.tensor([10.0, 500.0])
    frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128)  # original DiT: exponent k / half
    angles = t[:, None] * frequencies
    torch.testing.assert_close(embedder(t), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-4, rtol=1e-4)


def test_the_folder_says_which_frequencies_its_weights_want(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "stock", ["a", "b", "c"])
    save_generator(load_generator(tmp_path / "stock", frequency_shift=0.0), tmp_path / "original", ["a", "b", "c"])
    assert not (tmp_path / "stock" / "README.md").exists()
    assert "downscale_freq_shift = 0" in (tmp_path / "original" / "README.md").read_text()


@torch.no_grad()
def test_new_labels_stand_before_the_null_row_and_change_no_other(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "three", ["a", "b", "c"])
    opened = load_generator(tmp_path / "three", frequency_shift=0.0)
    wider = Generator(add_labels(opened.transformer, [None, 1]), opened.vae, SCHEDULE, labels=[4, 0, 3])
    save_generator(wider, tmp_path / "five", ["a", "b", "c", "d", "e"])
    again = load_generator(tmp_path / "five", frequency_shift=0.0)
    assert wider.null_label == again.null_label == 5
    assert wider.frequency_shift == 0
    table = again.transformer.state_dict()[LABEL_TABLE]
    old = opened.transformer.state_dict()[LABEL_TABLE]
    torch.testing.assert_close(table, torch.stack([*old[:3], old[:3].mean(dim=0), old[1], old[3]]))
    x, t, labels = batch()
    for network in (wider, again):
        assert torch.equal(network.predict(x, t, labels.where(labels < 3, 5)), opened.predict(x, t, labels))
        assert torch.equal(network.predict(x, t, torch.full_like(labels, 4)), opened.predict(x, t, torch.full_like(labels, 1)))
    assert wider.labels_of(torch.tensor([0, 1, 2, 0])).tolist() == [4, 0, 3, 4]
    drawn = wider.draw([0], [torch.Generator().manual_seed(0)], sampler="ddim", steps=2, guidance=2.0)
    same = again.draw([4], [torch.Generator().manual_seed(0)], sampler="ddim", steps=2, guidance=2.0)
    assert torch.equal(drawn, same)


def test_difffit_starts_as_the_identity_and_counts(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    loaded = load_generator(tmp_path).transformer
    chosen = choose_trainable(loaded, "difffit")
    x, t, labels = batch()
    assert torch.equal(loaded(x, timestep=t, class_labels=labels).sample, generator.predict(x, t, labels))
    dim = 32
    biases = 2 * (4 * dim + 4 * dim + dim + 6 * dim) + 2 * dim + dim + 2 * dim + 4
    assert sum(weight.numel() for weight in chosen.values()) == biases + 4 * dim + 1 * 6 * dim  # label table; scales in half of two blocks
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == set(chosen)


def test_nothing_else_is_trained() -> None:
    fresh = build_transformer(PRETRAIN, 3, 4)
    chosen = choose_trainable(fresh, "difffit")
    assert {name for name, weight in fresh.named_parameters() if weight.requires_grad} == set(chosen)
    assert choose_trainable(fresh, "all").keys() == dict(fresh.named_parameters()).keys()
    assert all(weight.requires_grad for weight in fresh.parameters())


def test_difffit_counts_of_dit_xl_2_on_the_meta_device() -> None:
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_embeds_ada_norm=1000
        )
        for block in transformer.transformer_blocks:
            block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
        assert sum(weight.numel() for weight in transformer.parameters()) == 674_834_720
        assert sum(weight.numel() for weight in choose_trainable(transformer, "difffit").values()) == 1_739_552


def test_a_delta_carries_the_change_over(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    trained, fresh = load_generator(tmp_path).transformer, load_generator(tmp_path).transformer
    chosen = choose_trainable(trained, "difffit")
    with torch.no_grad():
        for weight in chosen.values():
            weight.add_(0.1)
    delta = take_delta({name: weight.detach() for name, weight in chosen.items()}, [0, 1, 2, 3])
    apply_delta(fresh, delta)
    x, t, labels = batch()
    assert torch.equal(trained(x, timestep=t, class_labels=labels).sample, fresh(x, timestep=t, class_labels=labels).sample)
    assert not torch.equal(fresh(x, timestep=t, class_labels=labels).sample, generator.predict(x, t, labels))


def test_a_delta_holds_the_rows_of_its_classes_alone(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    opened = load_generator(tmp_path, labels=[2, 0])
    chosen = choose_trainable(opened.transformer, "difffit")
    before = chosen[LABEL_TABLE].detach().clone()
    assert moved_labels(opened, 2) == [0, 2, 3]
    delta = take_delta({name: weight.detach() + 1 for name, weight in chosen.items()}, moved_labels(opened, 2))
    assert delta[LABEL_TABLE].shape == (3, 32)
    apply_delta(opened.transformer, delta)
    torch.testing.assert_close(dict(opened.transformer.named_parameters())[LABEL_TABLE], before + torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    for rows in ([0, 1, 4], [0, 1]):  # a row that is not there, and not as many as values
        with pytest.raises(DiffstillError, match="does not fit this generator"):
            apply_delta(load_generator(tmp_path).transformer, delta | {LABEL_ROWS: torch.tensor(rows)})


@torch.no_grad()
def test_folded_scales_compute_the_same_in_the_stock_class(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "a", ["a", "b", "c"])
    opened = load_generator(tmp_path / "a")
    add_scales(opened.transformer)
    draws = torch.Generator().manual_seed(0)
    for name, weight in opened.transformer.named_parameters():
        if name.endswith("difffit_scale"):
            weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=draws))
    expected = opened.predict(*batch())
    fold_scales(opened.transformer)
    assert not any(name.endswith("difffit_scale") for name, _ in opened.transformer.named_parameters())
    torch.testing.assert_close(opened.predict(*batch()), expected)
    save_generator(opened, tmp_path / "b", ["a", "b", "c"])
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "b" / "transformer", low_cpu_mem_usage=False).eval()
    x, t, labels = batch()
    torch.testing.assert_close(stock(x, timestep=t, class_labels=labels).sample, expected)
    assert not torch.allclose(expected, generator.predict(*batch()), atol=1e-3)


@torch.no_grad()
def test_bf16_rounds_what_is_not_trained_and_little_else(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    opened = load_generator(tmp_path)
    chosen = choose_trainable(opened.transformer, "difffit")
    fast = opened.accelerate("bf16")
    output, expected = fast.predict(*batch()), generator.predict(*batch())
    assert output.dtype == torch.float32
    assert 0 < (output - expected).norm() / expected.norm() < 0.02
    assert {weight.dtype for weight in chosen.values()} == {torch.float32}
    assert {weight.dtype for name, weight in fast.transformer.named_parameters() if name.endswith("linear.weight")} == {torch.bfloat16}


def test_only_ancestral_sampling_uses_a_learned_variance() -> None:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 4}
    learned = share_embedder(DiTTransformer2DModel(**config, num_embeds_ada_norm=3).eval())
    made = Generator(learned, build_vae(PRETRAIN, 1, 8), SCHEDULE)
    drawn: dict[str, list[Tensor]] = {"ddpm": [], "ddim": [], "dpm++": []}
    for bias in (-1.0, 0.0):
        with torch.no_grad():
            learned.proj_out_2.weight.zero_()
            learned.proj_out_2.bias.copy_(torch.tensor([0.0, bias]).repeat_interleave(4).repeat(4))
        for sampler, images in drawn.items():
            images.append(made.draw([0, 2], [torch.Generator().manual_seed(seed) for seed in (0, 1)], sampler=sampler, steps=5, guidance=2.0))
    assert not torch.allclose(*drawn["ddpm"], atol=1e-3)
    assert torch.equal(*drawn["ddim"])
    assert torch.equal(*drawn["dpm++"])


@pytest.mark.slow
def test_compiled_blocks_and_recomputed_activations_give_the_same_gradients(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    x, t, labels = batch()
    gradients = {}
    for name, options in {"plain": {}, "compiled": {"compiled": True}, "checkpointing": {"checkpointing": True}}.items():
        opened = load_generator(tmp_path)
        chosen = choose_trainable(opened.transformer, "difffit")
        opened.accelerate("float32", **options).predict(x, t, labels).square().mean().backward()
        gradients[name] = {parameter: weight.grad for parameter, weight in chosen.items()}
    for name in ("compiled", "checkpointing"):
        for parameter, expected in gradients["plain"].items():
            torch.testing.assert_close(gradients[name][parameter], expected, rtol=1e-3, atol=1e-6)


def test_scales_multiply_each_of_their_places(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path, ["a", "b", "c"])
    scaled, folded = load_generator(tmp_path).transformer, load_generator(tmp_path).transformer
    add_scales(scaled)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in scaled.named_parameters():
            if name.endswith("difffit_scale"):
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=draws))
        block, plain = scaled.transformer_blocks[0], folded.transformer_blocks[0]
        for linear, scales in (
            (plain.attn1.to_q, [block.attn1.to_q]),
            (plain.attn1.to_k, [block.attn1.to_k]),
            (plain.attn1.to_v, [block.attn1.to_v]),
            (plain.attn1.to_out[0], [block.attn1.to_out[0], block.attn1]),
            (plain.ff.net[2], [block.ff]),
        ):
            for scale in scales:
                linear.weight.mul_(scale.difffit_scale[:, None])
                linear.bias.mul_(scale.difffit_scale)
        x, t, labels = batch()
        torch.testing.assert_close(scaled(x, timestep=t, class_labels=labels).sample, folded(x, timestep=t, class_labels=labels).sample)


def test_refusals(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(DiffstillError, match="not a diffusers DiTPipeline folder"):
        load_generator(tmp_path / "nothing")
    with pytest.raises(DiffstillError, match="does not fit this generator"):
        apply_delta(generator.transformer, {"unknown.weight": torch.zeros(1)})
    with pytest.raises(DiffstillError, match="cannot be halved"):
        build_vae(PRETRAIN, 1, 9)
    odd = PretrainConfig.model_validate_json(json.dumps({"dit": {"patch": 3}}))
    with pytest.raises(DiffstillError, match="does not divide"):
        build_vae(odd, 1, 8)
    save_generator(generator, tmp_path, ["a", "b", "c"])
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", low_cpu_mem_usage=False)
    with torch.no_grad():
        stock.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    stock.save_pretrained(tmp_path / "transformer")
    with pytest.raises(DiffstillError, match="block 1"):
        load_generator(tmp_path)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_schedulers_run_down_to_the_last_step(sampler: str) -> None:
    scheduler = build_scheduler(sampler, SCHEDULE, learned_variance=False)
    for steps in (1, 2, 3, 10, 20, 25):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert scheduler.timesteps[0] >= (999 if sampler == "dpm++" else 999 * (steps - 1) // steps)
        assert steps == 1 or scheduler.timesteps[-1] == 0
        assert (scheduler.timesteps.diff() < 0).all()


@pytest.mark.parametrize("steps", [2, 10, 25, 50, 100, 250])
def test_ddpm_visits_the_timesteps_of_the_original_respacing(steps: int) -> None:
    """Evenly spaced from 0 to 999, both ends among them, rounded (Improved DDPM, section 4)."""
    scheduler = build_scheduler("ddpm", SCHEDULE, learned_variance=True)
    scheduler.set_timesteps(steps)
    expected = [round(number * 999 / (steps - 1)) for number in range(steps)]
    assert scheduler.timesteps.tolist() == expected[::-1]


@pytest.mark.parametrize(
    ("sampler", "steps", "shares"),
    [
        ("ddim", 25, {0.01: 0.38, 0.1: 0.716, 0.5: 0.837, 1.0: 0.864}),
        ("dpm++", 10, {0.01: 0.99, 0.1: 1.053, 0.5: 1.073, 1.0: 1.076}),
        ("dpm++", 25, {0.01: 1.0, 0.1: 1.018, 0.5: 1.019, 1.0: 1.02}),
    ],
)
def test_share_of_a_gaussian_latents_variance_that_survives(sampler: str, steps: int, shares: dict[float, float]) -> None:
    """For latents N(0, v) the best prediction is linear in x_t, so a deterministic sampler multiplies its noise by one number."""
    scheduler = build_scheduler(sampler, SCHEDULE, learned_variance=False)
    for variance, expected in shares.items():
        scheduler.set_timesteps(steps)
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for t in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[int(t)].double()
            eps = (1 - abar).sqrt() * x / (abar * variance + 1 - abar)
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        assert x.item() ** 2 / variance == pytest.approx(expected, abs=0.006)
