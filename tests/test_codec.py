"""The codec: scale of the latents, chunks of frames, tiles, video VAEs; against diffusers' own calls."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    UNet2DModel,
)
from einops import rearrange
from scipy.fft import dct
from torch import nn

from latte.codec import VideoCodec, _windows, to_frames, to_tensor
from latte.config import CodecConfig

LEVEL = 2 / 255  # one step of 8-bit pixels, in [-1, 1]


def image_vae(**changes):
    torch.manual_seed(0)
    settings = dict(latent_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
                    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    return AutoencoderKL(**{**settings, **changes})


def temporal_vae():
    torch.manual_seed(0)
    return AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), layers_per_block=1, latent_channels=4,
                                        down_block_types=("DownEncoderBlock2D",) * 2)


def video_vae(name):
    torch.manual_seed(0)
    if name == "wan":
        return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    kind = {"cogvideox": AutoencoderKLCogVideoX, "hunyuan": AutoencoderKLHunyuanVideo}[name]
    return kind(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1)


def codec_of(vae, folder, **settings):
    vae.save_pretrained(folder)
    return VideoCodec(CodecConfig(kind="autoencoder", path=str(folder), **settings))


def clip(b=2, f=5, h=32, w=48):
    """Smooth pictures in [-1, 1]."""
    coarse = torch.randn(b * f, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    return rearrange(nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(-1, 1), "(b f) c h w -> b f c h w", b=b)


def test_pixels_and_frames_round_trip():
    frames = np.arange(2 * 3 * 4 * 11 * 3, dtype=np.int64).reshape(2, 3, 4, 11, 3).astype(np.uint8)
    assert set(frames.ravel()) == set(range(256))
    x = to_tensor(frames)
    assert x.shape == (2, 3, 3, 4, 11) and x.min() == -1 and x.max() == 1
    assert np.array_equal(to_frames(x), frames)
    assert torch.equal(to_tensor(frames[0]), x[:1])
    assert to_frames(torch.full((1, 1, 3, 1, 1), 1.5)).max() == 255 and to_frames(torch.full((1, 1, 3, 1, 1), -9.0)).min() == 0


def test_pixel_codec_is_the_identity():
    codec = VideoCodec(CodecConfig())
    x = clip()
    assert (codec.channels, codec.factor, codec.time_factor, codec.latent_shape(128, 64, 96)) == (3, 1, 1, (128, 3, 64, 96))
    assert torch.equal(codec.encode(x), x) and torch.equal(codec.decode(x), x) and codec.decode(x, frames=2).shape[1] == 2


@pytest.mark.parametrize(("settings", "mean", "scale"), [
    (dict(scaling_factor=0.18215), 0, 0.18215),
    (dict(scaling_factor=0.3611, shift_factor=0.1159), 0.1159, 0.3611),
    (dict(scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 4.0, 5.0]),
     torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1), 0.5 / torch.tensor([1.0, 2.0, 4.0, 5.0]).view(4, 1, 1)),
])
def test_latents_are_scaled_as_the_vae_says(tmp_path, settings, mean, scale):
    vae = image_vae(**settings).eval()
    codec = codec_of(vae, tmp_path)
    assert (codec.channels, codec.factor, codec.time_factor) == (4, 4, 1)
    x = clip()
    noise = torch.randn(2, 5, 4, 8, 12)
    with torch.no_grad():
        posterior = vae.encode(x.flatten(0, 1)).latent_dist
        wanted = (posterior.mean.unflatten(0, (2, 5)) - mean) * scale
        sampled = ((posterior.mean + posterior.std * noise.flatten(0, 1)).unflatten(0, (2, 5)) - mean) * scale
        z = codec.encode(x)
        torch.testing.assert_close(z, wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(codec.encode(x, noise), sampled, atol=1e-6, rtol=1e-5)
        decoded = vae.decode(posterior.mean).sample.unflatten(0, (2, 5))
        torch.testing.assert_close(codec.decode(z), decoded, atol=1e-5, rtol=1e-5)
    assert z.shape[1:] == codec.latent_shape(5, 32, 48)


@pytest.mark.parametrize("chunk_frames", [1, 2, 7])
def test_chunks_of_frames_change_nothing(tmp_path, chunk_frames):
    vae = image_vae()
    whole, chunked = codec_of(vae, tmp_path, chunk_frames=64), codec_of(vae, tmp_path, chunk_frames=chunk_frames)
    given = []
    chunked.vae.encoder.register_forward_hook(lambda module, args, out: given.append(len(args[0])))
    chunked.vae.decoder.register_forward_hook(lambda module, args, out: given.append(len(args[0])))
    x = clip(f=9)
    z = whole.encode(x)
    assert (chunked.encode(x) - z).abs().max() <= LEVEL * 0.01
    assert (chunked.decode(z) - whole.decode(z)).abs().max() <= LEVEL * 0.01
    assert max(given) == chunk_frames


def without_normalisation(module):
    """Group norms look at the whole picture; without them a layer reaches only as far as its convolutions."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, nn.Identity())
        else:
            without_normalisation(child)
    return module


def test_tiles_change_nothing_that_reaches_less_than_their_margin(tmp_path):
    vae = image_vae(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                    up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False)
    whole, tiled = codec_of(vae, tmp_path), codec_of(vae, tmp_path, tile_size=320)
    for codec in (whole, tiled):
        without_normalisation(codec.vae)
    sizes = []
    for part in (tiled.vae.encoder, tiled.vae.decoder):
        part.register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape[2:])))
    x = clip(b=1, f=2, h=400, w=480)
    z = whole.encode(x)
    assert (tiled.encode(x) - z).abs().max() <= z.std() * 0.01 * LEVEL
    y = whole.decode(z)
    assert (tiled.decode(z) - y).abs().max() <= y.std() * 0.01 * LEVEL
    assert set(sizes) == {(320, 320), (160, 160)} and len(sizes) == 2 * 4


def test_a_frame_that_fits_a_tile_is_not_cut(tmp_path):
    vae = image_vae()
    whole, tiled = codec_of(vae, tmp_path), codec_of(vae, tmp_path, tile_size=48)
    x = clip()
    assert torch.equal(whole.encode(x), tiled.encode(x))
    assert torch.equal(whole.decode(whole.encode(x)), tiled.decode(whole.encode(x)))


@pytest.mark.parametrize("length", [17, 40, 64, 65, 131])
def test_windows_equal_one_piece_within_their_reach(length):
    torch.manual_seed(0)
    smooth, down = nn.Conv1d(2, 3, 3, padding=1, bias=False), nn.Conv1d(2, 3, 2, stride=2)
    x = torch.randn(2, 2, length * 2)
    torch.testing.assert_close(_windows(smooth, x, 2, 32), smooth(x))
    torch.testing.assert_close(_windows(down, x, 2, 32, unit=2), down(x))
    up = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv1d(2, 3, 3, padding=1))
    torch.testing.assert_close(_windows(up, x, 2, 32), up(x))
    far = nn.Conv1d(2, 3, 31, padding=15, bias=False)  # reaches beyond the margin: the test can fail
    if length > 17:
        assert (_windows(far, x, 2, 32) - far(x)).abs().max() > 1e-3


def test_windows_that_disagree_are_blended_without_seams():
    calls = []
    y = _windows(lambda part: calls.append(1) or part * 0 + len(calls), torch.zeros(1, 256), 1, 64)[0]
    assert len(calls) > 3 and y[0] == 1 and y[-1] == len(calls)
    assert (y.diff().abs() <= 1 / 8 + 1e-6).all()  # a step of 1 is spread over half of the overlap of 16


def test_the_temporal_decoder_sees_whole_clips_and_overlapping_windows(tmp_path):
    vae = temporal_vae().eval()
    codec = codec_of(vae, tmp_path, chunk_frames=8)
    x = clip(f=8, h=16, w=16)
    z = codec.encode(x)
    with torch.no_grad():
        wanted = torch.stack([vae.decode(part / vae.config.scaling_factor, num_frames=8).sample for part in z])
    torch.testing.assert_close(codec.decode(z), wanted, atol=1e-5, rtol=1e-5)
    given = []
    codec.vae.decoder.register_forward_hook(lambda module, args, kwargs, out: given.append(kwargs["num_frames"]),
                                            with_kwargs=True)
    long = codec.decode(torch.cat([z, z], dim=1)[:, :13])
    assert long.shape == (2, 13, 3, 16, 16) and given == [8] * 4  # two windows for each of two clips
    first, last = (codec.decode(torch.cat([z, z], dim=1)[:, s]) for s in (slice(0, 8), slice(5, 13)))
    torch.testing.assert_close(long[:, :5], first[:, :5])  # before the overlap, and after it, a window's own frames
    torch.testing.assert_close(long[:, 8:], last[:, 3:])


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan"])
@pytest.mark.parametrize("frames", [1, 8, 9])
def test_video_vaes(tmp_path, name, frames):
    vae = video_vae(name).eval()
    codec = codec_of(vae, tmp_path, chunk_frames=2)
    assert (codec.factor, codec.time_factor) == (8, 4)
    x = clip(b=2, f=frames, h=16, w=32)
    z = codec.encode(x)
    assert z.shape[1:] == codec.latent_shape(frames, 16, 32) and z.shape[1] == {1: 1, 8: 3, 9: 3}[frames]
    padded = torch.cat([x, x[:, -1:]], dim=1) if frames == 8 else x
    with torch.no_grad():
        mean = vae.encode(rearrange(padded, "b f c h w -> b c f h w")).latent_dist.mean
        pixels = vae.decode(mean).sample
    unscaled = z / codec.scale + codec.mean
    torch.testing.assert_close(rearrange(unscaled, "b f c h w -> b c f h w"), mean, atol=1e-5, rtol=1e-4)
    y = codec.decode(z, frames)
    torch.testing.assert_close(y, rearrange(pixels, "b c f h w -> b f c h w")[:, :frames], atol=1e-3, rtol=0)
    if name == "wan":
        std = torch.tensor(vae.config.latents_std).view(-1, 1, 1)
        torch.testing.assert_close(codec.scale, 1 / std)


def test_a_fold_is_a_cosine_transform_along_time(tmp_path):
    plain = codec_of(image_vae(), tmp_path)
    codec = VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path), fold=4, waves=2, chunk_frames=3))
    assert (codec.channels, codec.factor, codec.time_factor, codec.by_frame) == (8, 4, 4, True)
    assert [codec.latent_shape(f, 32, 48)[0] for f in (1, 4, 5, 16)] == [1, 1, 2, 4]
    x = clip(f=6)
    mean, std = plain.posterior(torch.cat([x, x[:, -1:], x[:, -1:]], dim=1))  # the last frame fills up
    waves = dct(np.eye(4), norm="ortho", axis=0)[:2] * 0.5**0.5
    folded, spread = codec.posterior(x)
    assert folded.shape[1:] == codec.latent_shape(6, 32, 48)
    for k in range(2):
        wanted = sum(mean[:, t::4] * waves[k, t] for t in range(4))
        torch.testing.assert_close(folded[:, :, 4 * k:4 * k + 4], wanted, atol=1e-5, rtol=1e-4)
        wanted = sum(std[:, t::4]**2 * waves[k, t]**2 for t in range(4)).sqrt()
        torch.testing.assert_close(spread[:, :, 4 * k:4 * k + 4], wanted, atol=1e-5, rtol=1e-4)
    still = clip(f=1).expand(-1, 8, -1, -1, -1)
    torch.testing.assert_close(codec.decode(codec.encode(still), 7), plain.decode(plain.encode(still))[:, :7], atol=1e-4, rtol=0)
    assert codec.encode(still).square().mean() == pytest.approx(plain.encode(still).square().mean().item(), rel=1e-5)


def test_a_fold_with_all_its_waves_loses_nothing(tmp_path):
    plain = codec_of(image_vae(), tmp_path)
    codec = VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path), fold=4, waves=4))
    x = clip(f=6)
    torch.testing.assert_close(codec.decode(codec.encode(x), 6), plain.decode(plain.encode(x)), atol=1e-4, rtol=0)


def test_gains_scale_the_waves_of_a_fold_and_are_undone(tmp_path):
    codec_of(image_vae(), tmp_path)
    plain, codec = (VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path), fold=4, waves=2, gains=gains))
                    for gains in ([], [0.5, 4.0]))
    x, factors = clip(f=6), torch.tensor([0.5, 4.0]).repeat_interleave(4)[:, None, None]
    for some, wanted in zip(codec.posterior(x), plain.posterior(x), strict=True):
        torch.testing.assert_close(some, wanted * factors, rtol=0, atol=0)
    torch.testing.assert_close(codec.decode(codec.encode(x), 6), plain.decode(plain.encode(x), 6), atol=1e-5, rtol=0)


def test_a_fold_is_for_vaes_that_code_frames_by_themselves(tmp_path):
    with pytest.raises(ValueError, match="codec.fold: must be 1"):
        codec_of(video_vae("wan"), tmp_path, fold=4)
    for wrong, told in (({"fold": 0}, "codec.fold"), ({"fold": 2, "waves": 3}, "codec.waves"), ({"waves": 0}, "codec.waves"),
                        ({"gains": [2.0]}, "codec.gains"), ({"fold": 2, "waves": 2, "gains": [1.0]}, "codec.gains"),
                        ({"fold": 2, "waves": 2, "gains": [1.0, 0.0]}, "codec.gains")):
        with pytest.raises(ValueError, match=told):
            CodecConfig(kind="autoencoder", path=str(tmp_path), **wrong)
    with pytest.raises(ValueError, match="codec.fold"):
        CodecConfig(fold=2)


def test_a_vae_without_a_posterior(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    codec = codec_of(vae, tmp_path)
    x = clip()
    with torch.no_grad():
        wanted = vae.encode(x.flatten(0, 1)).latents.unflatten(0, (2, 5))
    z = codec.encode(x, noise=torch.randn(2, 5, 4, 4, 6))
    torch.testing.assert_close(z, wanted * vae.config.scaling_factor)
    assert codec.decode(z).shape == x.shape


def test_the_codec_is_frozen_and_keeps_its_precision(tmp_path):
    codec = codec_of(image_vae(), tmp_path, dtype="bfloat16")
    assert codec.vae.dtype == torch.bfloat16 and not codec.vae.training
    assert not any(p.requires_grad for p in codec.vae.parameters())
    z = codec.encode(clip().requires_grad_())
    assert z.dtype == torch.float32 and not z.requires_grad and codec.decode(z).dtype == torch.float32


def test_wrong_places_and_sizes_are_refused_by_the_key(tmp_path):
    UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")
    for place in ("unet", "gone"):
        with pytest.raises(ValueError, match="codec.path: .* is neither a folder nor a hub id of a diffusers VAE"):
            VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path / place)))
    image_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="codec.path: .* is neither"):
        VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path / "vae")))
    codec = codec_of(image_vae(), tmp_path / "pipe/vae")
    assert VideoCodec(CodecConfig(kind="autoencoder", path=str(tmp_path / "pipe"), subfolder="vae")).factor == codec.factor
    with pytest.raises(ValueError, match="codec.tile_size: must be a multiple of 16"):
        codec_of(image_vae(), tmp_path / "pipe/vae", tile_size=40)
    with pytest.raises(ValueError, match="height and width must be multiples of 4, .* got 30x48"):
        codec.encode(clip(h=30))
