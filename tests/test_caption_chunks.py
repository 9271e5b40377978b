"""Captions of several chunks of 75 tokens: layout, encoding, maps, training on them, and drawing from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import WORDS, Listed, sample
from recipe import recipe_module, refusal_of
from test_attention import draw, stock_probabilities
from test_recipes import EVALUATION, SPLITS, TRAINER, make_folder, read_metrics, run
from test_report import _card as write_card
from tiny import save_tiny, tiny_sd, tiny_sdxl, tiny_tokenizer
from training import KINDS, example, generator, phantoms, prepared
from transformers import CLIPTokenizer

from distill.attention import attention_layers, record_pipeline, to_image
from distill.config import BaseConfig, DenoisingConfig, EvaluationConfig, FullEvaluation, RunConfig
from distill.data.batch import Batch
from distill.data.rows import TrainingRows
from distill.errors import UserError
from distill.evaluation.causal import causal_maps
from distill.evaluation.drawing import generate
from distill.evaluation.localization import localization
from distill.evaluation.protocols import open_recorder, prepare_inputs, queries
from distill.evaluation.word_maps import read_word_maps, write_word_maps
from distill.experiment.derive import derived_base
from distill.methods.key_lock import lock_keys, merge_keys
from distill.models import Model, load_model, model_of, prompt_embeddings
from distill.models.text_encoder import multi_label_encoder
from distill.tokens import BOS, EOS, PADDING, WORD, Tokenizers, find_words

ROOM = 75
LONG = "Clear " * 18 + "a a effusion. " + "Small " * 9 + "edema"
"""By the tiny tokenizer `effusion` crosses the first border, and `edema` lies in the second chunk."""
BUILDS: dict[str, Callable[[], Any]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}


def model(kind: str = "sd", chunks: int = 2, seed: int = 0) -> Model:
    found = model_of(BUILDS[kind](seed=seed))
    found.caption_chunks = chunks
    return found.freeze()


def test_one_chunk_is_what_the_stock_pipelines_tokenize() -> None:
    found = model("sdxl", chunks=1)
    texts = ["", "pleural effusion", LONG, "Épanchement <|endoftext|> 中"]
    stock = [
        tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        for tokenizer in found.tokenizers
    ]
    assert all(map(torch.equal, found.tokenize(texts), stock))
    for own, ids in zip(found.encode(stock), found.family.encode_text(found.text_encoders, stock), strict=True):
        assert torch.equal(own, ids)


def padded_by(token: str) -> CLIPTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = token
    return tokenizer


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["effusion", "pleural", "the", "of", "Opacity,", "中", "é"]), max_size=9),
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from(["<|endoftext|>", "!"]),
)
def test_each_token_is_where_a_loop_puts_it(words: list[str], times: int, chunks: int, padding: str) -> None:
    caption, tokenizer = " ".join(words * times), padded_by(padding)
    plain = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
    ids, groups, offsets = [], [], []
    for chunk in range(chunks):
        own = slice(chunk * ROOM, (chunk + 1) * ROOM)
        part = plain["input_ids"][own]
        rest = ROOM - len(part)
        ids += [tokenizer.bos_token_id, *part, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * rest
        groups += [BOS, *[WORD] * len(part), EOS] + [PADDING] * rest
        offsets += [(0, 0), *plain["offset_mapping"][own], (0, 0)] + [(0, 0)] * rest
    text = Tokenizers([tokenizer], chunks)
    assert (text.max_tokens, text.longest_caption) == (77 * chunks, ROOM * chunks + 2)
    assert text.tokenize([caption, ""])[0][0].tolist() == ids
    assert text.token_groups(caption).tolist() == groups
    for start, end in find_words(caption, ["effusion", "opacity"]):
        expected = [place for place, (first, last) in enumerate(offsets) if first < end and start < last]
        assert text.token_spans(caption, [(start, end)]) == expected
    assert text.caption_lengths([caption]) == [len(plain["input_ids"]) + 2]
    assert (text.caption_lengths([caption])[0] > text.longest_caption) == (len(plain["input_ids"]) > chunks * ROOM)


def test_the_long_caption_has_a_word_on_the_border_and_one_behind_it() -> None:
    text = Tokenizers([tiny_tokenizer()], 2)
    on_it, behind = (text.token_spans(LONG, find_words(LONG, [word])) for word in ("effusion", "edema"))
    assert {0} < {place // 77 for place in on_it} == {0, 1} and {place // 77 for place in behind} == {1}


@pytest.mark.parametrize("kind", list(BUILDS))
def test_chunks_are_encoded_one_by_one(kind: str) -> None:
    one, two = model(kind, 1), model(kind, 2)
    states, pooled = two.encode(two.tokenize(["pleural effusion", LONG]))
    short, of_short = one.encode(one.tokenize(["pleural effusion", ""]))
    assert states.shape[1] == 154 and torch.allclose(states[0].unflatten(0, (2, 77)), short, atol=1e-6)
    for chunk in (0, 1):
        ids = [ids[1:, chunk * 77 : (chunk + 1) * 77] for ids in two.tokenize(["", LONG])]
        alone, of_chunk = two.family.encode_text(two.text_encoders, ids)
        assert torch.allclose(states[1:, chunk * 77 : (chunk + 1) * 77], alone, atol=1e-6)
        if of_chunk is not None and pooled is not None:
            assert torch.allclose(pooled[1:], of_chunk, atol=1e-6) is (chunk == 0)
    if pooled is not None and of_short is not None:
        assert pooled.shape == (2, 16) and torch.allclose(pooled[0], of_short[0], atol=1e-6)


def test_label_words_on_the_border_are_marked_and_what_is_too_long_is_refused() -> None:
    found, data = model(), Listed([sample("a", LONG, ("pleural effusion", None), ("edema", None))], WORDS)
    row = TrainingRows(data, found, label_tokens=True, regions=True)[0]
    both = found.token_spans(LONG, find_words(LONG, ["effusion", "edema"]))
    assert row.label_tokens is not None and row.label_tokens.nonzero().flatten().tolist() == both
    assert row.regions is not None and row.regions.flatten(1).any(dim=1).nonzero().flatten().tolist() == both
    assert row.groups.shape == (154,) and row.text.input_ids[0].shape == (154,)  # type: ignore[union-attr]


SENTENCES = {label: [f"There is {'a small and faint ' * 8}{label}."] for label in phantoms().findings}
LONG_TEXTS = DenoisingConfig(caption_dropout=0.5, training_text="paraphrases", paraphrases=SENTENCES)


@pytest.mark.parametrize("name", [*KINDS, "key_lock-words", "key_lock-sdxl"])
def test_each_method_trains_on_chunks(name: str) -> None:
    method, rows = example(name, LONG_TEXTS, chunks=2)
    batch = Batch.stack([rows[i] for i in range(4)])
    assert batch.groups.shape == (4, 154) and (batch.groups[:, 78:] == WORD).any()
    method.train()
    x = method.noised(batch, generator(1))
    assert x.dropped is not None and x.dropped.any() and not x.dropped.all()
    assert x.groups[x.dropped][:, [0, 1, 77, 78]].tolist() == [[BOS, EOS, BOS, EOS]] * int(x.dropped.sum())
    terms = method(batch, generator(1))
    terms["loss"].backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad and p.grad is not None]
    assert all(term.isfinite().all() for term in terms.values()) and any(bool(g.any()) for g in gradients)
    method.finish()


def test_a_merge_of_keys_that_did_not_change_changes_nothing() -> None:
    student = prepared(chunks=2)
    texts = [f"{number} {text}" for number in range(10) for text in (LONG, LONG.upper(), "effusion")]
    inputs = student.tokenize([LONG])
    before = {name: layer.clone() for name, layer in student.denoiser.state_dict().items() if "to_k" in name}
    merged = merge_keys(lock_keys(student), texts, progress=False)
    assert set(merged.r2) == {"words", "eos", "padding"} and min(merged.r2.values()) > 0.999
    assert student.encode(inputs)[0].shape == (1, 154, 16)
    for name, layer in before.items():
        torch.testing.assert_close(student.denoiser.state_dict()[name], layer, rtol=0, atol=1e-5)


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BUILDS))
def test_images_of_an_evaluation_are_those_that_a_user_draws(kind: str) -> None:
    found = model(kind)
    found.pipeline.set_progress_bar_config(disable=True)
    config = FullEvaluation(num_inference_steps=2, guidance_scale=4.0)
    cut = LONG[: find_words(LONG, ["edema"])[0][0]]
    ours, shorter = generate(found, [LONG, cut], [3, 3], 64, config)
    text = prompt_embeddings(found.pipeline, LONG, chunks=2)
    assert text["prompt_embeds"].shape == text["negative_prompt_embeds"].shape == (1, 154, 16 * len(found.tokenizers))
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    arguments |= {"height": 64, "width": 64, "generator": torch.Generator().manual_seed(3)}
    torch.testing.assert_close(found.pipeline(**text, **arguments).images[0], ours, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, shorter, atol=1e-5), "words behind the first chunk count"


@pytest.mark.parametrize("kind", list(BUILDS))
def test_with_one_chunk_the_embeddings_are_those_of_the_stock_pipeline(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = BUILDS[kind]()
    text = prompt_embeddings(pipe, ["effusion", LONG], chunks=1)
    stock = pipe.encode_prompt(
        ["effusion", LONG], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    for ours, theirs in zip(text.values(), stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    (length,) = Tokenizers([pipe.tokenizer]).caption_lengths([LONG])
    assert f"a prompt of {length} tokens is cut at 77; give more chunks" in caplog.text
    with pytest.raises(UserError, match="chunks is 0; expected a whole number from 1 on"):
        prompt_embeddings(pipe, "effusion", chunks=0)
    caplog.clear()
    own = prompt_embeddings(pipe, "effusion", chunks=2, negative="edema")
    assert torch.equal(own["negative_prompt_embeds"], prompt_embeddings(pipe, "edema", chunks=2)["prompt_embeds"])
    assert prompt_embeddings(pipe, LONG, chunks=2) and not caplog.text


def test_maps_of_a_drawn_prompt_are_those_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    text = prompt_embeddings(pipe, LONG, chunks=2)
    names, tokens = attention_layers(pipe.unet), Tokenizers(model_of(pipe).tokenizers, 2)
    with stock_probabilities(pipe.unet, names) as stock:
        draw(pipe, **text, guidance_scale=7.5)
    with record_pipeline(pipe, LONG, chunks=2) as maps:
        draw(pipe, **text, guidance_scale=7.5)
    (heat,) = maps.heat_maps((8, 8))
    for word in ("effusion", "edema"):
        places = tokens.token_spans(LONG, find_words(LONG, [word]))
        found = []
        for name in names:
            mean = torch.stack([p.chunk(2)[1][..., places].mean(dim=(1, 3)) for p in stock[name]]).mean(dim=0)
            side = round(mean.shape[1] ** 0.5)
            found.append(to_image(mean[..., None], (side, side), (8, 8))[0, 0])
        torch.testing.assert_close(heat[word], torch.stack(found).mean(dim=0), atol=2e-6, rtol=1e-4)
    message = "texts of 154 tokens reach the denoiser, where 2 of 77 were selected from; give both the same prompts and chunks"
    with pytest.raises(ValueError, match=message.replace("2 of", "1 of")), record_pipeline(pipe, LONG, "Clear"):
        draw(pipe, **text, guidance_scale=1.0)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_maps_are_of_words_on_the_border_and_behind_it(tmp_path: Path, accelerator: Accelerator) -> None:
    found = model()
    data = Listed([sample("a", LONG, ("pleural effusion", None), ("edema", None))], WORDS)
    config = FullEvaluation(localization_images=1, timesteps=(300,), bootstrap_samples=10, causal=True)
    (query,) = queries(data, found, config)
    assert set(query.tokens) == {
        tuple(found.token_spans(LONG, find_words(LONG, [word]))) for word in ("effusion", "edema")
    }
    inputs = prepare_inputs(found, [data[0]], [query], torch.device("cpu"))
    with ExitStack() as stack:
        recorder = open_recorder(stack, found, attention_layers(found.denoiser), config)
        recorder.cross.reduce = inputs.reduce
        (own,) = causal_maps(inputs, [query], config, recorder.cross)
    assert own.shape == (2, 2, 8, 8) and own.flatten(2).gt(0).any(dim=-1).all()
    result = localization(found, data, config, accelerator=accelerator, arm_dir=tmp_path)
    assert result["word"]["pairs"] == 2
    write_word_maps(found, data, config, examples=[0], accelerator=accelerator, arm_dir=tmp_path)
    maps = read_word_maps(tmp_path, 0)
    assert maps is not None and {"effusion", "edema"} <= set(maps.maps)


def long_reports(folder: Path) -> Path:
    return make_folder(folder, "file_name,text,split", lambda i: f"{'mild ' * 30}heart {i},{SPLITS[i]}")


def drawn_by(card: str) -> Any:
    """The image that the code of a model card draws, in one step."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None and "**prompt_embeddings(pipe, " in code[1] and "chunks=2)" in code[1]
    scope: dict[str, Any] = {}
    exec(code[1].replace("num_inference_steps=20", "num_inference_steps=1"), scope)
    return scope["image"]


def test_the_code_of_a_card_draws_and_fewer_chunks_than_trained_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "checkpoints" / "phantom-base")
    tiny_sd(seed=1).unet.save_pretrained(tmp_path / "run" / "unet")
    card = write_card(tmp_path / "run", {"unet": "unet"}, base={"caption_chunks": 2})
    assert drawn_by(card).size == (64, 64)
    (tmp_path / "run" / "config.yaml").write_text("base: {name: phantom, caption_chunks: 2}")
    message = "run was trained with base.caption_chunks 2, and base.caption_chunks is 1; give --base.caption_chunks 2"
    with pytest.raises(UserError, match=message):
        load_model(BaseConfig(name=str(base)), "run")
    for chunks in (2, 3):
        assert load_model(BaseConfig(name=str(base), caption_chunks=chunks), "run").caption_chunks == chunks


@pytest.mark.slow
def test_a_run_on_long_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "checkpoints" / "phantom-base")
    argv = ["--base.name", str(base), "--base.caption_chunks", "2", *EVALUATION]
    argv += ["--data.kind", "folder", "--data.root", str(long_reports(tmp_path / "data")), "--data.resolution", "64"]
    run("finetune", [*argv, *TRAINER, "--output_dir", "run", "--text_encoder", "full"])
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "prompt_embeddings(pipe, 'mild" in card and drawn_by(card).size == (64, 64)
    run("evaluate", [*argv, "--run", "run", "--output_dir", "again"])
    first, again = (read_metrics(tmp_path / name)["arms"]["model"]["quality"] for name in ("run", "again"))
    assert first == again


def test_a_smaller_model_keeps_the_chunks(tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "sd")), caption_chunks=3, frozen_dtype="bf16")
    config = RunConfig(base=base, output_dir=str(tmp_path / "out"), dry_run=True, evaluation=EvaluationConfig())
    with derived_base(config, None, "base") as smaller:
        assert (smaller.caption_chunks, smaller.frozen_dtype) == (3, "bf16")
        assert load_model(smaller).max_tokens == 3 * 77


# --- what makes no sense --------------------------------------------------------------------------------------------


def test_a_text_encoder_of_another_kind_has_no_chunks(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.text_encoder, pipe.tokenizer = multi_label_encoder(["edema"], width=16, max_tokens=20)
    with pytest.raises(
        UserError, match="tokenizer is a .*, and chunks are of CLIP's tokens; set base.caption_chunks to 1"
    ):
        prompt_embeddings(pipe, "edema", chunks=2)
    assert prompt_embeddings(pipe, "edema", chunks=1)["prompt_embeds"].shape == (1, 20, 16)


@pytest.mark.parametrize("name", ["swap_text_encoder", "benchmark_training"])
def test_recipes_without_chunks_say_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_module(name)
    argv = ["--base.caption_chunks", "2", "--output_dir", str(tmp_path / "out")]
    if name == "swap_text_encoder":
        message = refusal_of(
            recipe.swap, recipe.SwapTextEncoderConfig, [*argv, "--text_encoder", "multi_label"], capsys
        )
    else:
        message = refusal_of(recipe.benchmark, recipe.BenchmarkTrainingConfig, argv, capsys)
    assert "base.caption_chunks is 2, and" in message and not (tmp_path / "out").exists()
