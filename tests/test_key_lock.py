"""Key-locking: it changes nothing by itself, keys never see the trained encoder, and the merge is exact where it can
be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_sd
from training import NO_DROPOUT, batch_of, context_of, generator, has_gradient, phantoms, prepared, tokens_of

from distill.attention.recording import attention_layers
from distill.config import BaseConfig, LoraConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import training_caption
from distill.draws import shared_generator
from distill.errors import UserError
from distill.methods import method_of
from distill.methods.key_lock import KeyLockedTextEncoder, Merged, _end_of, lock_keys, merge_keys
from distill.methods.options import KeyLockOptions
from distill.models.adapters import prepare_training
from distill.models.export import export, prove_parity
from distill.models.family import Model
from distill.models.loading import load_model
from distill.tokens import BOS, EOS, PADDING, WORD, token_groups

CAPTIONS = [PhantomDataset("train", 60, 0, 64).caption(i) for i in range(60)]


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    found = load_model(BaseConfig(name=str(save_tiny(tmp_path / "base", request.param))))
    prepare_training(found, denoiser="full", text_encoder="full", lora=LoraConfig())
    return found


def seen(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Output of the U-Net on fixed inputs, and what the keys and the values of each layer are."""
    unet, found = model.denoiser, {"to_k": {}, "to_v": {}}  # type: ignore[var-annotated]
    handles = [
        getattr(unet.get_submodule(name), part).register_forward_hook(
            lambda _m, _i, out, into=found[part], name=name: into.__setitem__(name, out)
        )
        for name in attention_layers(unet)
        for part in found
    ]
    embeds, pooled = model.encode(model.tokenize(CAPTIONS[:2]))
    added = (
        None if pooled is None else {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = unet(latents, torch.tensor([300, 600]), embeds, added_cond_kwargs=added, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return out, found["to_k"], found["to_v"]


def disturb(model: Model) -> None:
    """Other weights for the encoders that are trained, as a training would give."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for encoder in model.text_encoders:
            for parameter in getattr(encoder, "trained", encoder).parameters():
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=draws)


def test_untrained_it_changes_nothing_and_merges_to_nothing(model: Model) -> None:
    images = draw(model)
    before = seen(model)
    weights = copy.deepcopy(model.denoiser.state_dict())
    encoders = list(model.text_encoders)
    lock = lock_keys(model)
    torch.testing.assert_close(seen(model)[0], before[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(draw(model), images, atol=1e-5, rtol=0)
    merged = merge_keys(lock, CAPTIONS)
    assert model.text_encoders == encoders and model.pipeline.text_encoder is encoders[0]
    assert merged.r2 == pytest.approx(dict.fromkeys(("words", "eos", "padding"), 1.0))
    torch.testing.assert_close(dict(model.denoiser.state_dict()), dict(weights), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen(model)[0], before[0], atol=1e-6, rtol=0)


def draw(model: Model) -> torch.Tensor:
    size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    images: torch.Tensor = model.pipeline(
        CAPTIONS[:2], generator=[torch.Generator().manual_seed(i) for i in range(2)], **size
    ).images
    return images


def test_keys_see_the_encoder_as_it_was_and_values_the_trained_one(model: Model) -> None:
    _, keys, values = seen(model)
    lock_keys(model)
    disturb(model)
    _, now, drawn = seen(model)
    for name in keys:
        torch.testing.assert_close(now[name], keys[name], atol=1e-6, rtol=0)
        assert (drawn[name] - values[name]).abs().max() > 1e-3


def test_no_gradient_reaches_the_trained_encoder_through_keys(model: Model) -> None:
    lock_keys(model)
    torch.stack([key.square().sum() for key in seen(model)[1].values()]).sum().backward()
    for encoder in model.text_encoders:
        assert all(p.grad is None or not p.grad.any() for p in encoder.trained.parameters())
        assert all(p.requires_grad for p in encoder.trained.parameters())
        assert not any(p.requires_grad for p in encoder.frozen.parameters())


def test_the_images_reach_the_trained_encoder_and_resting_dropout_stays_off(model: Model) -> None:
    lock_keys(model)
    torch.nn.ModuleList(model.text_encoders).train()
    seen(model)[0].square().sum().backward()
    for encoder in model.text_encoders:
        assert encoder.trained.training and not encoder.frozen.training
        assert any(p.grad is not None and p.grad.any() for p in encoder.trained.parameters())


def test_the_fit_is_judged_on_captions_that_are_not_fitted() -> None:
    """A caption that is held out and occurs among the others tells nothing."""

    def measured(captions: list[str]) -> dict[str, float]:
        model = prepared(tiny_sd)
        lock = lock_keys(model)
        disturb(model)
        return merge_keys(lock, captions, progress=False).r2

    others = [f"{caption} {n}" for n, caption in enumerate(CAPTIONS * 4)][:9]
    assert measured(["a small effusion", *others]).keys() == {"words", "padding"}, "one EOS has no spread"
    assert measured(["a small effusion", *others[:8], "a small effusion"]) == {}
    two = ["a small effusion", *others, "an opacity", *others]
    assert measured(two) != measured([others[0], *others, "an opacity", *others]), "the new one alone is judged"


def test_a_linear_change_of_the_hidden_states_is_merged_exactly(tmp_path: Path) -> None:
    model = load_model(BaseConfig(name=str(save_tiny(tmp_path / "base", "sd"))))
    prepare_training(model, denoiser="full", text_encoder="full", lora=LoraConfig())
    _, keys, _ = seen(model)
    lock = lock_keys(model)
    norm = model.text_encoders[0].trained.get_submodule(
        next(n for n, _ in model.text_encoders[0].trained.named_modules() if n.endswith("final_layer_norm"))
    )
    with torch.no_grad():  # its bias is 0, so that hidden states are scaled, each column by its own
        norm.weight *= torch.linspace(0.5, 2.0, len(norm.weight))
    merged = merge_keys(lock, CAPTIONS)
    assert min(merged.r2.values()) > 0.999
    _, now, _ = seen(model)
    for name in keys:
        torch.testing.assert_close(now[name], keys[name], atol=2e-3, rtol=0)


def test_after_any_change_the_merge_is_nearer_to_the_locked_keys_and_exports_stock(
    model: Model, tmp_path: Path
) -> None:
    _, keys, _ = seen(model)
    lock = lock_keys(model)
    disturb(model)
    plain = copy.deepcopy(lock)
    plain.release()
    merge_keys(lock, CAPTIONS)
    gaps = []
    for one in (plain.model, model):
        with torch.no_grad():
            now = seen(one)[1]
        gaps.append(sum(float((now[name] - keys[name].detach()).square().sum()) for name in keys))
    assert gaps[1] < 0.5 * gaps[0]
    written = export(model, tmp_path / "run")
    assert {"unet", "text_encoder"} <= set(written)
    loaded = load_model(BaseConfig(name=str(tmp_path / "base")), run=tmp_path / "run")
    assert prove_parity(model, loaded, "cpu") < 1e-5


def test_few_captions_fit_the_empty_one_and_a_rank_beyond_the_width_is_the_width(tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "base", "sd")))
    model = load_model(base)
    prepare_training(model, denoiser="lora", text_encoder="full", lora=LoraConfig(rank=2, alpha=2.0))
    lock = lock_keys(model)
    disturb(model)
    with torch.no_grad():
        wanted, mine = model.encode(model.tokenize([""]))[0].chunk(2, dim=-1)
    before = model.denoiser.get_submodule(attention_layers(model.denoiser)[0]).to_k
    with torch.no_grad():
        target, unmerged = before.base_layer(wanted), before.base_layer(mine)
    merged = merge_keys(lock, CAPTIONS[:10], rank=40)
    assert all(merged.r2_unmerged[name] < value for name, value in merged.r2.items())
    with torch.no_grad():
        found = model.denoiser.get_submodule(attention_layers(model.denoiser)[0]).to_k(mine)
    assert (found - target).square().sum() < 0.3 * (unmerged - target).square().sum()
    export(model, tmp_path / "run")
    assert prove_parity(model, load_model(base, run=tmp_path / "run"), "cpu") < 1e-5


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_adapters_take_the_keys_in_exactly_and_stock_diffusers_loads_them(kind: str, tmp_path: Path) -> None:
    """The map between the encoders has at most 16 dimensions here, so that this rank merges as full weights do."""
    base = BaseConfig(name=str(save_tiny(tmp_path / "base", kind)))
    width = 16 if kind == "sd" else 32
    merged = []
    for denoiser in ("lora", "full"):
        model = load_model(base)
        torch.manual_seed(0)
        prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2, alpha=3.0))
        disturb_adapters(model)
        if denoiser == "full":  # the same model without adapters in the U-Net
            for name in attention_layers(model.denoiser):
                layer = model.denoiser.get_submodule(name).to_k
                layer.merge()
        lock = lock_keys(model)
        with torch.no_grad():
            for encoder in model.text_encoders:
                for name, parameter in encoder.trained.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        r2 = merge_keys(lock, CAPTIONS, rank=width if denoiser == "lora" else None)
        merged.append((model, r2))
    (lora, r2), (full, wanted) = merged
    assert r2.r2 == pytest.approx(wanted.r2, abs=1e-6)
    with torch.no_grad():
        ours, theirs = seen(lora)[1], seen(full)[1]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)
    assert set(export(lora, tmp_path / "run")) == {"lora"}
    loaded = load_model(base, run=tmp_path / "run")
    assert prove_parity(lora, loaded, "cpu") < 1e-5
    layer = loaded.denoiser.get_submodule(attention_layers(loaded.denoiser)[0])
    assert (layer.to_k.r["default"], layer.to_v.r["default"]) == (2 + width, 2)


def disturb_adapters(model: Model) -> None:
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (model.denoiser, *model.text_encoders):
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=draws)


def test_a_unet_that_projects_the_text_itself_is_refused(model: Model) -> None:
    model.denoiser.register_to_config(encoder_hid_dim=8)
    with pytest.raises(UserError, match="projects the text before its cross-attention"):
        lock_keys(model)


# --- the method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_the_method_locks_at_set_up_and_gives_stock_modules_back(trained: str, tmp_path: Path) -> None:
    student, said, asked = prepared(tiny_sd, trained, trained), [], []
    encoder = student.text_encoders[0]

    def captions(count: int) -> list[str]:
        asked.append(count)
        return CAPTIONS

    method = method_of(KeyLockOptions(locked_tokens="all"), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path, say=said.append, captions=captions))
    (locked,) = method.text_encoders
    assert isinstance(locked, KeyLockedTextEncoder) and locked.trained is encoder and method.trains_text
    assert all(p.requires_grad == (".frozen." not in name) for name, p in method.named_parameters() if "lora" in name)
    rates = method.parameter_groups(1e-3, 1e-5)
    assert [group["lr"] for group in rates] == [1e-3, 1e-5]
    assert {id(p) for p in rates[1]["params"]} == {id(p) for p in encoder.parameters() if p.requires_grad}
    loss = method.train()(batch_of(student), generator())["loss"]
    loss.backward()
    assert has_gradient(encoder) and has_gradient(student.denoiser) and not has_gradient(locked.frozen)
    found = method.finish()
    assert student.text_encoders == [encoder] and student.pipeline.text_encoder is encoder and asked == [2000]
    assert min(found["r2"].values()) > 0.99 and found["seconds"] > 0, "nothing was trained, so all is restored"
    assert json.loads((tmp_path / "key_lock.json").read_text(encoding="utf-8")) == found
    assert len(said) == 1 and said[0].startswith("the locked keys are merged into the weights")
    assert "words 1.00 (1.00 if they were not merged)" in said[0] and str(tmp_path / "key_lock.json") in said[0]


def test_a_dry_run_releases_without_a_merge(tmp_path: Path) -> None:
    student = prepared()
    encoder, weights = student.text_encoders[0], copy.deepcopy(student.denoiser.state_dict())
    method = method_of(KeyLockOptions(locked_tokens="all"), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path, dry_run=True))
    disturb(student)
    assert method.finish() == {} and student.text_encoders == [encoder] and list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, weights[name]) for name, value in student.denoiser.state_dict().items())


def test_copies_that_keys_see_are_of_the_frozen_type(tmp_path: Path) -> None:
    student = prepared()
    method = method_of(KeyLockOptions(locked_tokens="all"), NO_DROPOUT)
    method.setup(student, context_of(frozen_dtype=torch.bfloat16, dry_run=True))
    locked: Any = method.text_encoders[0]
    assert {p.dtype for p in locked.frozen.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in locked.trained.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch_of(student), generator())["loss"]
    assert torch.isfinite(loss)
    method.finish()


@pytest.mark.parametrize(("tokens", "told"), [("all", ["words", "eos"]), ("words", ["words"]), ("tail", ["eos"])])
def test_a_merge_that_is_worse_than_none_is_said(
    tokens: Any, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tokens whose keys are locked, and of no others."""

    def bad(*arguments: Any, **options: Any) -> Merged:
        return Merged({"words": 0.9, "eos": 0.2}, {"words": 0.5, "eos": 0.3})

    monkeypatch.setattr("distill.methods.key_lock.merge_keys", bad)
    said: list[str] = []
    method = method_of(KeyLockOptions(locked_tokens=tokens), NO_DROPOUT)
    method.setup(prepared(), context_of(log_dir=tmp_path, say=said.append))
    method.finish()
    fits = {"words": "words 0.90 (0.50 if they", "eos": "eos 0.20 (0.30 if they"}
    assert [name for name, text in fits.items() if text in said[0]] == told
    warned = [text.startswith("warning: for eos the merge is worse than none") for text in said[1:]]
    assert warned == [True] * ("eos" in told)


# --- what is locked -------------------------------------------------------------------------------------------------


def groups_of(model: Model) -> torch.Tensor:
    """(captions, tokens) of the captions that `seen` reads."""
    return torch.stack([token_groups(model.tokenizers[0], text, model.max_tokens) for text in CAPTIONS[:2]])


@pytest.mark.parametrize(("eos", "sep", "end"), [(None, 7, 7), (5, None, 5), (5, 7, 5), (0, None, 0), (None, None, -1)])
def test_a_caption_ends_with_the_end_token_else_the_separator(eos: Any, sep: Any, end: int) -> None:
    assert _end_of(SimpleNamespace(eos_token_id=eos, sep_token_id=sep)) == end  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "locked"), [("words", (BOS, WORD)), ("tail", (EOS, PADDING))])
def test_only_the_asked_tokens_keep_their_keys(model: Model, tokens: Any, locked: tuple[int, ...]) -> None:
    _, keys, _ = seen(model)
    lock = lock_keys(model, tokens=tokens)
    disturb(model)
    _, now, _ = seen(model)
    plain = copy.deepcopy(lock)
    plain.release()
    free = seen(plain.model)[1]
    held = torch.isin(groups_of(model), torch.tensor(locked))
    assert held.any() and not held.all()
    for name in attention_layers(model.denoiser)[:1]:  # the queries of later layers differ, keys do not
        torch.testing.assert_close(now[name][held], keys[name][held], atol=1e-6, rtol=0)
        torch.testing.assert_close(now[name][~held], free[name][~held], atol=1e-6, rtol=0)
    (torch.stack([key[~held].square().sum() for key in now.values()]).sum()).backward(retain_graph=True)
    for encoder in model.text_encoders:
        assert any(p.grad is not None and p.grad.any() for p in encoder.trained.parameters()), "free tokens train it"
        encoder.zero_grad()
    torch.stack([key[held].square().sum() for key in now.values()]).sum().backward()
    for encoder in model.text_encoders:
        assert all(p.grad is None or not p.grad.any() for p in encoder.trained.parameters())


def test_only_the_asked_layers_keep_their_keys(model: Model) -> None:
    _, keys, _ = seen(model)
    lock = lock_keys(model, layers=("up_blocks",))
    disturb(model)
    _, now, _ = seen(model)
    weights = {n: model.denoiser.get_submodule(n).to_k.weight.clone() for n in keys}
    plain = copy.deepcopy(lock)
    plain.release()
    free = seen(plain.model)[1]
    merge_keys(lock, CAPTIONS)
    for name in keys:
        locked = name.startswith("up_blocks")
        torch.testing.assert_close(now[name], keys[name] if locked else free[name], atol=1e-6, rtol=0)
        assert torch.equal(model.denoiser.get_submodule(name).to_k.weight, weights[name]) != locked, (
            "merged where locked"
        )
    with pytest.raises(UserError, match="starts with 'sideways'"):
        lock_keys(model, layers=("sideways",))


@pytest.mark.parametrize("tokens", ["all", "words", "tail"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_lock_of_some_layers_and_tokens_exports_stock(trained: Any, tokens: Any, tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "base", "sd")))
    student = load_model(base)
    torch.manual_seed(0)
    prepare_training(student, denoiser=trained, text_encoder=trained, lora=LoraConfig(rank=16, alpha=16.0))
    options = KeyLockOptions(locked_layers=("up_blocks", "mid_block"), locked_tokens=tokens)
    method = method_of(options, NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path, captions=lambda count: CAPTIONS))
    disturb_adapters(student) if trained == "lora" else disturb(student)
    merged = method.finish()
    locked = {"all": ("words", "eos", "padding"), "words": ("words",), "tail": ("eos", "padding")}[tokens]
    assert all(merged["r2"][group] > merged["r2_unmerged"][group] for group in locked if group in merged["r2"])
    assert {group for group, value in merged["r2_unmerged"].items() if value == 1} == set(merged["r2"]) - set(locked)
    assert set(export(student, tmp_path / "run")) == ({"lora"} if trained == "lora" else {"unet", "text_encoder"})
    assert prove_parity(student, load_model(base, run=tmp_path / "run"), "cpu") < 1e-5


def test_released_keys_pass_over_to_the_trained_encoder_and_need_no_merge(tmp_path: Path) -> None:
    student, said = prepared(tiny_sd), []
    method: Any = method_of(
        KeyLockOptions(locked_tokens="all", release_after_steps=2, release_over_steps=4), NO_DROPOUT
    )
    method.setup(student, context_of(log_dir=tmp_path, say=said.append))
    _, keys, _ = seen(student)
    disturb(student)
    plain = copy.deepcopy(method._lock)
    plain.release()
    free, shares = seen(plain.model)[1], []
    name = attention_layers(student.denoiser)[0]
    for step in range(1, 8):
        method(batch_of(student), shared_generator(0, step, 0, 1, step=step))
        shares.append(method.state()["unlocked"].item())
        now = seen(student)[1][name]
        torch.testing.assert_close(now, keys[name] + shares[-1] * (free[name] - keys[name]), atol=1e-5, rtol=0)
    assert shares == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    weights = copy.deepcopy(student.denoiser.state_dict())
    assert method.finish() == {} and said == [] and list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, weights[key]) for key, value in student.denoiser.state_dict().items())


def test_a_checkpoint_knows_how_far_the_keys_are_released(tmp_path: Path) -> None:
    """After a kill between the last step and the export no step says it, and the merge depends on it."""
    method, other = (
        method_of(KeyLockOptions(locked_tokens="all", release_after_steps=1), NO_DROPOUT) for _ in range(2)
    )
    for one in (method, other):
        one.setup(prepared(), context_of(dry_run=True))
    method(batch_of(method.student), shared_generator(0, 0, 0, 1, step=51))
    other.load_state(method.state())
    assert (
        other.text_encoders[0].unlocked == 0.5
        and method_of(KeyLockOptions(locked_tokens="all"), NO_DROPOUT).state() == {}
    )


def test_labels_at_random_places_train_with_locked_keys(tmp_path: Path) -> None:
    """RaLI (Dombrowski et al. 2024), alone and with locked keys, and both cost what the diffusion loss costs."""
    denoising = NO_DROPOUT.model_copy(update={"insert_labels": "random"})
    rows = range(12)
    plain, inserted = (batch_of(prepared(), rows, denoising=one) for one in (NO_DROPOUT, denoising))
    assert not torch.equal(tokens_of(plain), tokens_of(inserted))
    student = prepared()
    method = method_of(KeyLockOptions(locked_tokens="all"), denoising)
    captions = [training_caption(phantoms(), i, denoising) for i in rows]
    method.setup(student, context_of(log_dir=tmp_path, captions=lambda count: captions))
    method.train()(inserted, generator())["loss"].backward()
    assert has_gradient(student.text_encoders[0].trained) and method.passes(1, 12) == 36
    found = method.finish()
    assert min(found["r2"].values()) > 0.99


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_keys_that_are_not_trained_stay_the_base_s_until_the_merge(trained: Any, tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "base", "sd")))
    student = load_model(base)
    prepare_training(student, denoiser=trained, text_encoder=trained, lora=LoraConfig(rank=2, alpha=2.0))
    options = KeyLockOptions(train_keys=False, locked_layers=("up_blocks",))
    method = method_of(options, NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path, captions=lambda count: CAPTIONS))
    layers = {name: student.denoiser.get_submodule(name) for name in attention_layers(student.denoiser)}
    for name, layer in layers.items():
        assert any(p.requires_grad for p in layer.to_k.parameters()) == (not name.startswith("up_blocks"))
        assert any(p.requires_grad for p in layer.to_v.parameters())
    before = {name: layer.to_k.state_dict() for name, layer in layers.items() if name.startswith("up_blocks")}
    before = copy.deepcopy(before)
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=10.0)
    method.train()(batch_of(student), generator())["loss"].backward()
    optimizer.step()
    for name, state in before.items():
        assert all(torch.equal(value, state[key]) for key, value in layers[name].to_k.state_dict().items())
    method.finish()
    export(student, tmp_path / "run")
    assert prove_parity(student, load_model(base, run=tmp_path / "run"), "cpu") < 1e-5


def test_the_readable_loss_is_the_share_that_a_linear_map_leaves(tmp_path: Path) -> None:
    """Against a loop over token groups; a trained map that restores the keys costs nothing."""
    student = prepared(tiny_sd, "lora", "lora")
    method: Any = method_of(KeyLockOptions(readable_weight=0.5), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path))
    disturb_adapters(student)
    batch = batch_of(student)
    x = method.noised(batch, generator())
    embeds = method.embeddings(student, list(method.text_encoders), x).embeds
    with torch.no_grad():
        method.reader.weight.add_(0.1 * torch.randn(method.reader.weight.shape, generator=generator()))
    width = embeds.shape[-1] // 2
    shares = []
    for code in (WORD, EOS, PADDING):
        y, states = embeds[..., :width][x.groups == code], embeds[..., width:][x.groups == code]
        left = ((states @ method.reader.weight.T - y) ** 2).sum() / ((y - y.mean(dim=0)) ** 2).sum().clamp(min=1e-6)
        shares.append(float(left.detach()))
    terms = method.train()(batch, generator())
    assert float(terms["unreadable"]) == pytest.approx(sum(shares) / 3, rel=1e-4)
    assert float(terms["loss"]) == pytest.approx(float(terms["denoising"] + 0.5 * terms["unreadable"]), rel=1e-6)
    terms["unreadable"].backward()
    assert has_gradient(student.text_encoders[0].trained) and method.reader.weight.grad is not None
    assert not has_gradient(student.denoiser), "it is of the text alone"


@pytest.mark.parametrize("rows", [[0, 0, 0], [0]])
def test_captions_that_are_alike_do_not_blow_up_the_readable_loss(rows: list[int], tmp_path: Path) -> None:
    """Their end tokens are alike too, and nothing can be told apart by a map."""
    student = prepared(tiny_sd, "lora", "lora")
    method: Any = method_of(KeyLockOptions(readable_weight=0.5), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path))
    disturb_adapters(student)
    terms = method.train()(batch_of(student, rows), generator())
    assert float(terms["unreadable"]) < 10
    terms["loss"].backward()
    embeds = torch.ones(2, 5, len(method._lock.columns[0]) * 2, requires_grad=True)
    nothing = method._unreadable(embeds, torch.full((2, 5), WORD))
    nothing.backward()
    assert float(nothing.detach()) == 0 and not embeds.grad.any()


def test_the_map_that_reads_keys_is_trained_and_not_exported(tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "base", "sd")))
    student = load_model(base)
    prepare_training(student, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2, alpha=2.0))
    method: Any = method_of(KeyLockOptions(readable_weight=1.0), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path, captions=lambda count: CAPTIONS))
    groups = method.parameter_groups(1e-3, 1e-4)
    assert groups[-1]["lr"] == 1e-3 and groups[-1]["params"][0] is method.reader.weight
    named = [p for _, p in method.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(named)
    disturb_adapters(student)
    optimizer = torch.optim.Adam([method.reader.weight], lr=0.02)
    before = None
    for _ in range(60):
        terms = method.train()(batch_of(student), generator())
        before = float(terms["unreadable"]) if before is None else before
        optimizer.zero_grad()
        terms["unreadable"].backward()
        optimizer.step()
    assert float(terms["unreadable"].detach()) < 0.7 * (before or 0), "a map that is trained reads more"
    method.finish()
    assert set(export(student, tmp_path / "run")) == {"lora"}
    assert prove_parity(student, load_model(base, run=tmp_path / "run"), "cpu") < 1e-5
    plain: Any = method_of(KeyLockOptions(), NO_DROPOUT)
    plain.setup(load_model(base), context_of())
    assert not hasattr(plain, "reader") and len(plain.parameter_groups(1e-3, 1e-4)) <= 2
