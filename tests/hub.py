"""A folder shaped like Latte-1 on the hub, small and with random weights: tokenizer, T5, VAE, transformer, scheduler."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WORDS = ("a", "the", "small", "large", "red", "blue", "circle", "square", "star", "moves", "to", "left", "right", "dog", "runs",
         "on", "grass")
SHAPE = dict(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
             in_channels=4, out_channels=8, cross_attention_dim=24, attention_bias=True, activation_fn="gelu-approximate",
             num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=5)


def randomise(model: torch.nn.Module, std: float = 0.2, seed: int = 1) -> torch.nn.Module:
    """Every weight random, so that no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = std * torch.randn(p.shape, generator=generator)
    return model.eval()


def transformer(**changes) -> LatteTransformer3DModel:
    return randomise(LatteTransformer3DModel(**{**SHAPE, **changes}))


def tokenizer() -> T5Tokenizer:
    pieces = [(f"▁{word}", -1.0 - i / 100) for i, word in enumerate(WORDS)]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,!"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *letters], extra_ids=0)


def pipeline(**changes) -> LattePipeline:
    words = tokenizer()
    torch.manual_seed(0)
    text = T5EncoderModel(T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
                        sample_size=64, scaling_factor=0.18215).eval()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, timestep_spacing="leading")
    pipe = LattePipeline(words, text, vae, transformer(**changes), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def folder(path: Path, **changes) -> LattePipeline:
    """Writes the pipeline to `path` and returns it."""
    pipe = pipeline(**changes)
    pipe.save_pretrained(path)
    return pipe
