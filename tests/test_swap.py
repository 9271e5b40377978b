"""Another text encoder in a pipeline: the fold is exact, the pipeline is stock, and it trains, exports and loads
again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from distill.config import BaseConfig, LoraConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.models import text_encoder
from distill.models.adapters import prepare_training
from distill.models.export import export, prove_parity
from distill.models.family import Model
from distill.models.loading import load_model, model_of
from distill.models.text_encoder import load_text_encoder, multi_label_encoder, swap_text_encoder
from distill.tokens import BOS, EOS, PADDING, WORD, Tokenizers, find_words, token_groups, token_spans

LENGTH = 64
CAPTIONS = [PhantomDataset("train", 60, 0, 64).caption(i) for i in range(60)]


def save_tokenizer(folder: Path, *, start: str | None) -> None:
    """Words and characters, trained on the captions; `start` None is T5's way, without a start token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    template = "$A [SEP]" if start is None else f"{start} $A [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def save_encoder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "t5":
        model: Any = T5EncoderModel(T5Config(vocab_size=300, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    elif kind == "distilbert":
        model = DistilBertModel(DistilBertConfig(vocab_size=300, dim=24, hidden_dim=32, n_layers=1, n_heads=2))
    else:
        size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertModel(BertConfig(vocab_size=300, max_position_embeddings=LENGTH, **size))
    model.save_pretrained(folder)
    save_tokenizer(folder, start=None if kind == "t5" else "[CLS]")
    return folder


@pytest.fixture(scope="module", params=["bert", "distilbert", "t5"])
def swapped(request: pytest.FixtureRequest, sd: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    encoder, tokenizer = load_text_encoder(str(save_encoder(folder / "encoder", request.param)), max_tokens=LENGTH)
    pipeline, _ = swap_text_encoder(sd, encoder, tokenizer, CAPTIONS)
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_stock_diffusers_loads_it_and_encodes_as_we_do(swapped: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(swapped)
    model = load_model(BaseConfig(name=str(swapped)))
    theirs, empty = pipeline.encode_prompt(CAPTIONS[:3], "cpu", 1, True)
    ours, _ = model.encode(model.tokenize(CAPTIONS[:3]))
    assert ours.shape == (3, LENGTH, 24)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    nothing, _ = model.encode(model.tokenize([""] * 3))
    torch.testing.assert_close(nothing, empty, atol=1e-6, rtol=0)
    image = pipeline(CAPTIONS[0], height=64, width=64, num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_padding_does_not_reach_the_words(swapped: Path) -> None:
    model = load_model(BaseConfig(name=str(swapped)))
    ids = model.tokenize(["small effusion"])[0]
    words = int((token_groups(model.tokenizers[0], "small effusion", LENGTH) != PADDING).sum())
    whole, _ = model.encode([ids])
    cut, _ = model.encode([ids[:, :words]])
    torch.testing.assert_close(whole[:, :words], cut, atol=1e-5, rtol=0)


def test_groups_and_words_of_other_tokenizers(swapped: Path) -> None:
    tokenizer = load_model(BaseConfig(name=str(swapped))).tokenizers[0]
    caption = "No pleural EFFUSION."
    groups = token_groups(tokenizer, caption, LENGTH)
    ids = tokenizer(caption)["input_ids"]
    starts = tokenizer.convert_ids_to_tokens(ids)[0] == "[CLS]"
    assert int((groups == BOS).sum()) == starts
    assert int((groups == EOS).sum()) == 1
    assert int(groups[len(ids) - 1]) == EOS
    assert int((groups == WORD).sum()) == len(ids) - 1 - starts
    spans = token_spans(tokenizer, caption, find_words(caption, ["effusion"]), LENGTH)
    assert spans and all(groups[i] == WORD for i in spans)
    assert "".join(tokenizer.convert_ids_to_tokens([ids[i] for i in spans])).replace("##", "") == "effusion"


def test_the_projection_is_folded_exactly(sd: Model, tmp_path: Path) -> None:
    """The new U-Net on the new states is the old one on their projection, whatever the projection."""
    encoder, tokenizer = load_text_encoder(str(save_encoder(tmp_path, "bert")), max_tokens=LENGTH)
    pipeline, _ = swap_text_encoder(sd, encoder, tokenizer, CAPTIONS)
    new = model_of(pipeline)
    name = next(n for n, _ in sd.denoiser.named_parameters() if n.endswith("attn2.to_k.weight"))
    old_k, new_k = sd.denoiser.get_parameter(name).double(), new.denoiser.get_parameter(name).double()
    projection = torch.linalg.lstsq(old_k, new_k).solution  # (old width, new width)
    torch.testing.assert_close(old_k @ projection, new_k, atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, LENGTH, 24, generator=generator)
    latents = torch.randn(2, sd.denoiser.config.in_channels, 8, 8, generator=generator)
    ours = new.denoiser(latents, 5, states).sample
    if sd.denoiser.config.cross_attention_dim <= old_k.shape[0]:  # to_k alone tells the projection
        theirs = sd.denoiser(latents, 5, (states.double() @ projection.T).float()).sample
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    others = {k: v for k, v in new.denoiser.state_dict().items() if "attn2.to_k" not in k and "attn2.to_v" not in k}
    assert all(torch.equal(v, sd.denoiser.state_dict()[k]) for k, v in others.items())


def test_swapping_in_the_same_encoder_changes_little(sd: Model, tmp_path: Path) -> None:
    sd.text_encoders[0].save_pretrained(tmp_path)
    sd.tokenizers[0].save_pretrained(tmp_path)
    encoder, tokenizer = load_text_encoder(str(tmp_path), max_tokens=sd.max_tokens)
    encoder.config.use_attention_mask = False  # as the base
    _, fit = swap_text_encoder(sd, encoder, tokenizer, CAPTIONS)
    assert fit > 0.98
    worse, tokenizer = load_text_encoder(str(save_encoder(tmp_path / "random", "bert")), max_tokens=LENGTH)
    assert swap_text_encoder(sd, worse, tokenizer, CAPTIONS)[1] < fit


def test_it_trains_and_its_run_loads_again(swapped: Path, tmp_path: Path) -> None:
    model = load_model(BaseConfig(name=str(swapped)))
    prepare_training(model, denoiser="full", text_encoder="full", lora=LoraConfig())
    latents = torch.randn(1, model.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, _ = model.encode(model.tokenize(CAPTIONS[:1]))
    model.denoiser(latents, 5, embeds).sample.pow(2).mean().backward()
    trained = [p for p in model.text_encoders[0].parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained), "under DDP, a parameter without a gradient is an error"
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.1 * parameter.grad.sign()
    export(model, tmp_path)
    assert prove_parity(model, load_model(BaseConfig(name=str(swapped)), run=tmp_path), "cpu") == 0


def test_adapters_that_stock_diffusers_could_not_load_are_refused(swapped: Path) -> None:
    model = load_model(BaseConfig(name=str(swapped)))
    lora = LoraConfig(text_encoder_targets=("query", "value"))
    with pytest.raises(UserError, match="adapters of CLIP text encoders only"):
        prepare_training(model, denoiser="lora", text_encoder="lora", lora=lora)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no folder", "cannot load"),
        ("a decoder", "cannot load"),
        ("no tokenizer", "5 tokens and the encoder embeds 300"),
        ("other weights", "cannot load|lacks"),
        ("too long", "64 positions"),
    ],
)
def test_what_is_no_text_encoder_is_refused(change: str, words: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "bert", "bert")
    if change == "no folder":
        folder = tmp_path / "elsewhere"
    elif change == "a decoder":
        (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    elif change == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif change == "other weights":
        save_encoder(tmp_path / "distilbert", "distilbert")
        (tmp_path / "distilbert" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UserError, match=words):
        load_text_encoder(str(folder), max_tokens=LENGTH + (change == "too long"))


def test_a_foreign_class_is_read_as_the_kind_that_it_is_of(tmp_path: Path) -> None:
    """CXR-BERT names a class of its own, and its weights are BERT's, under `bert.`."""
    folder = save_encoder(tmp_path, "bert")
    known, _ = load_text_encoder(str(folder), max_tokens=LENGTH)
    config = (folder / "config.json").read_text(encoding="utf-8").replace('"bert"', '"cxr-bert"')
    (folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match="cannot load"):
        load_text_encoder(str(folder), max_tokens=LENGTH)
    read, _ = load_text_encoder(str(folder), "bert", max_tokens=LENGTH)
    for name, value in known.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


def test_bases_that_cannot_be_swapped(loaded: dict[str, Model], tmp_path: Path) -> None:
    encoder, tokenizer = load_text_encoder(str(save_encoder(tmp_path, "bert")), max_tokens=LENGTH)
    with pytest.raises(UserError, match="SD 1.x and 2.x"):
        swap_text_encoder(loaded["sdxl"], encoder, tokenizer, CAPTIONS)
    with pytest.raises(UserError, match="at least 10"):
        swap_text_encoder(loaded["sd"], encoder, tokenizer, CAPTIONS[:9])


def test_multi_label_tokens_stand_alone(sd: Model, tmp_path: Path) -> None:
    """One token a label, the same in any order and company; read back from a stock pipeline, with maps of each word."""
    train = PhantomDataset("train", 60, 0, 64, captions="labels")
    captions = [train.caption(i) for i in range(60)]
    assert "no finding" in captions and "pleural effusion" in " ".join(captions)
    labels = {label for i in range(60) for label in train.labels(i)}
    encoder, tokenizer = multi_label_encoder(sorted(labels), width=16, max_tokens=12)
    assert len(tokenizer) == 4 + len(labels) + 1
    pipeline, _ = swap_text_encoder(sd, encoder, tokenizer, captions)
    pipeline.save_pretrained(tmp_path / "base")
    model = load_model(BaseConfig(name=str(tmp_path / "base")))
    texts = ["Edema, pleural effusion", "pleural  effusion; edema", "edema", "edema, oedema"]
    ids = model.tokenize(texts)[0]
    assert [(row != 0).sum() for row in ids] == [4, 4, 3, 4] and (ids == 1).sum() == 1  # [UNK]
    with torch.no_grad():
        states, _ = model.encode([ids])
    assert sorted(ids[0].tolist()) == sorted(ids[1].tolist())
    for row, other in ((0, 1), (0, 2), (0, 3)):
        mine, theirs = ids[row].tolist(), ids[other].tolist()
        for token in set(mine) & set(theirs):
            torch.testing.assert_close(states[row, mine.index(token)], states[other, theirs.index(token)])
    one = model.tokenizers[0]
    assert token_spans(one, texts[0], find_words(texts[0], ["effusion"]), 12) == [2]
    assert token_spans(one, texts[0], find_words(texts[0], ["pleural", "effusion"]), 12) == [2]
    prepare_training(model, denoiser="full", text_encoder="full", lora=LoraConfig())
    export(model, tmp_path / "run")
    loaded = load_model(BaseConfig(name=str(tmp_path / "base")), run=tmp_path / "run")
    assert prove_parity(model, loaded, "cpu") < 1e-5


def test_multi_label_tokens_need_labels_and_room() -> None:
    with pytest.raises(UserError, match="no training image has a label"):
        multi_label_encoder([], width=16, max_tokens=12)
    with pytest.raises(UserError, match="max_tokens is 3, and 2 labels need 2 more"):
        multi_label_encoder(["Edema", "opacity"], width=16, max_tokens=3)


@pytest.mark.parametrize("batch_size", [32, 7])
def test_the_projection_and_its_quality_are_those_of_least_squares(
    sd: Model, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 25 captions the 1st, 11th and 21st are held out, as often as they occur; words that one of the two lacks count
    nowhere."""
    rng, captions = np.random.default_rng(0), [str(i) for i in range(25)]
    mix, theirs, ours = rng.normal(size=(5, 16)), {}, {}
    for caption in captions:
        new = rng.normal(size=(3, 5))
        old = new @ mix + 0.5 * rng.normal(size=(3, 16)) + 1.0
        keys = [("word", k) for k in range(3)]
        theirs[caption] = dict(zip([*keys, ("word", 9)], torch.from_numpy(np.vstack([old, old[:1]])), strict=True))
        ours[caption] = dict(
            zip([*keys[::-1], ("word", 8)], torch.from_numpy(np.vstack([new[::-1], new[:1]])), strict=True)
        )
    seen: list[int] = []

    def by_word(model: Model, part: list[str]) -> Any:
        seen.append(len(part))
        return [(theirs if model is sd else ours)[caption] for caption in part]

    monkeypatch.setattr(text_encoder, "_by_word", by_word)
    pipeline, quality = text_encoder.swap_text_encoder(
        sd, sd.text_encoders[0], sd.tokenizers[0], [*captions, *captions[::3]], batch_size=batch_size
    )
    assert sum(seen) == 50 and max(seen) == min(batch_size, 25)
    rows = {held: [(ours[c]["word", k].numpy(), theirs[c]["word", k].numpy()) for i, c in enumerate(captions)
                   for k in range(3) if (i % 10 == 0) == held] for held in (True, False)}  # fmt: skip
    (held, wanted), (a, b) = (
        (np.stack([x for x, _ in part]), np.stack([y for _, y in part])) for part in rows.values()
    )
    ridge = 1e-3 * np.mean(np.diag(a.T @ a)) * np.eye(5)
    projection = np.linalg.solve(a.T @ a + ridge, a.T @ b).T
    expected = 1 - np.sum((wanted - held @ projection.T) ** 2) / np.sum((wanted - wanted.mean(axis=0)) ** 2)
    assert quality == pytest.approx(expected) and 0 < quality < 1
    before, after = sd.denoiser.state_dict(), pipeline.unet.state_dict()
    for name, value in after.items():
        folded = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        own = before[name].double().numpy() @ projection if folded else before[name].numpy()
        np.testing.assert_allclose(value.numpy(), own, atol=1e-6, err_msg=name)
    assert pipeline.unet.config.cross_attention_dim == 5 and pipeline.vae is sd.pipeline.vae
    with pytest.raises(UserError, match="9 captions are too few"):
        text_encoder.swap_text_encoder(sd, sd.text_encoders[0], sd.tokenizers[0], captions[:9])


def test_a_clip_encoder_is_read_as_the_stock_pipeline_reads_it(sd: Model, tmp_path: Path) -> None:
    """Its padding is its end token, so that ids do not tell which is which."""
    sd.text_encoders[0].save_pretrained(tmp_path / "clip")
    sd.tokenizers[0].save_pretrained(tmp_path / "clip")
    encoder, tokenizer = load_text_encoder(str(tmp_path / "clip"), max_tokens=sd.max_tokens)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    swap_text_encoder(sd, encoder, tokenizer, CAPTIONS)[0].save_pretrained(tmp_path / "new")
    model = load_model(BaseConfig(name=str(tmp_path / "new")))
    theirs, _ = model.pipeline.encode_prompt(CAPTIONS[:2], "cpu", 1, False)
    ours, _ = model.encode(model.tokenize(CAPTIONS[:2]))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_word_has_no_token_of_the_one_that_it_touches(sd: Model) -> None:
    (rows,) = text_encoder._by_word(sd, ["mass. edema"])
    hidden = sd.encode(sd.tokenize(["mass. edema"]))[0][0]
    spans = {start: sd.token_spans("mass. edema", [(start, end)]) for start, end in ((0, 4), (4, 5), (6, 11))}
    assert sorted(place for kind, place in rows if kind == "word") == [0, 4, 6]
    assert not set(spans[0]) & set(spans[4]), "the end token of the word belongs to the word alone"
    for start, tokens in spans.items():
        torch.testing.assert_close(rows["word", start], hidden[tokens].mean(dim=0))


def test_an_empty_caption_of_t5_is_its_end_alone(tmp_path: Path) -> None:
    _, tokenizer = load_text_encoder(str(save_encoder(tmp_path, "t5")), max_tokens=LENGTH)
    text = Tokenizers([tokenizer])
    assert text.tokenize([""])[0][0, :3].tolist() == [3, 0, 0]
    assert text.token_groups("").tolist()[:3] == [EOS, PADDING, PADDING]


@pytest.mark.parametrize(("tokens", "fits"), [(40, True), (41, False)])
def test_roberta_has_fewer_places_than_positions(tokens: int, fits: bool, tmp_path: Path) -> None:
    """It counts from behind the padding's id, here 1."""
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=42, **size)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, start="[CLS]")
    if fits:
        encoder, _ = load_text_encoder(str(tmp_path), max_tokens=tokens)
        assert encoder(torch.full((1, tokens), 7))[0].shape == (1, tokens, 24)
        return
    with pytest.raises(UserError, match="has 40 positions"):
        load_text_encoder(str(tmp_path), max_tokens=tokens)
