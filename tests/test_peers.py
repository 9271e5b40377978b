"""diffusers' loops, which ours are timed beside: one step by hand, and the clock."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny import tiny_sd

from distill.config import TrainerConfig
from distill.experiment import peers
from distill.experiment.peers import DiffusersTraining
from distill.models import model_of

ROWS = [(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1, f"an edema, {i}") for i in range(6)]
ADAM: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.3, "max_grad_norm": 0.02}


def training(kind: str = "epsilon", rank: int | None = None, **options: Any) -> DiffusersTraining:
    trainer = TrainerConfig(batch_size=2, tracker="none", **(ADAM | options))
    torch.manual_seed(0)
    return DiffusersTraining(model_of(tiny_sd(kind)), ROWS, trainer, Accelerator(), rank)


@pytest.mark.parametrize(("kind", "rank"), [("epsilon", None), ("v_prediction", None), ("epsilon", 3)])
def test_a_step_is_that_of_the_script(kind: str, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws again, the loss written out, and torch's AdamW on the clipped gradient."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self: self.mean)
    peer = training(kind, rank)
    seen: list[tuple[Any, ...]] = []
    peer.unet.register_forward_hook(lambda module, given, out: seen.append((*given, out[0])))
    trained = {n: p.detach().clone() for n, p in peer.unet.named_parameters() if p.requires_grad}
    frozen = [p for m in (peer.vae, peer.text_encoder) for p in m.parameters()]
    assert not any(p.requires_grad for p in frozen)
    if rank is None:
        assert len(trained) == len(list(peer.unet.parameters()))
    else:
        assert trained and all("lora_" in name for name in trained)
        assert {name.split(".lora_")[0].split(".attn")[1][2:] for name in trained} == {
            "to_k",
            "to_q",
            "to_v",
            "to_out.0",
        }
        shapes = {p.shape[0] if "lora_A" in name else p.shape[1] for name, p in trained.items()}
        scales = {m.scaling["default"] for m in peer.unet.modules() if hasattr(m, "scaling")}
        assert shapes == {rank} and scales == {1.0}
        assert all((p == 0).all() == ("lora_B" in name) for name, p in trained.items())
    (batch,) = [b for place, b in enumerate(peer.loader) if place == 0]
    torch.manual_seed(7)
    peer._step(batch)

    torch.manual_seed(7)
    latents = peer.vae.encode(batch["pixel_values"]).latent_dist.mean * peer.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (2,))
    keep = DDPMScheduler.from_config(tiny_sd(kind).scheduler.config).alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy, given_steps, hidden, out = seen[0]
    torch.testing.assert_close(noisy, keep.sqrt() * latents + (1 - keep).sqrt() * noise)
    assert torch.equal(given_steps, timesteps) and given_steps.dtype == torch.long
    torch.testing.assert_close(hidden, peer.text_encoder(batch["input_ids"])[0])
    target = noise if kind == "epsilon" else keep.sqrt() * noise - (1 - keep).sqrt() * latents
    copies = {n: v.clone().requires_grad_() for n, v in trained.items()}
    again = torch.func.functional_call(peer.unet, copies, (noisy.detach(), timesteps, hidden.detach()))
    loss = F.mse_loss(again[0], target)
    torch.testing.assert_close(again[0], out)
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(copies.values(), 0.02) > 0.02
    optimizer = torch.optim.AdamW(copies.values(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, eps=1e-8)
    optimizer.step()
    for name, parameter in peer.unet.named_parameters():
        if name in copies:
            torch.testing.assert_close(parameter, copies[name], msg=name)
            assert parameter.grad is None, "not added to the next step's"


def test_a_batch_has_the_pixels_and_the_padded_tokens_of_random_rows() -> None:
    peer, tokenizer = training(), tiny_sd().tokenizer
    torch.manual_seed(1)
    orders = []
    for _ in range(2):
        batches = list(peer.loader)
        assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 2]
        pixels, ids = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "input_ids"))
        order = [next(i for i, row in enumerate(ROWS) if torch.equal(row[0], one)) for one in pixels]
        assert sorted(order) == list(range(6)) and pixels.dtype == torch.float32
        expected = tokenizer([ROWS[i][1] for i in order], max_length=77, padding="max_length", return_tensors="pt")
        assert torch.equal(ids, expected.input_ids)
        orders.append(order)
    assert orders[0] != orders[1]


def test_long_captions_are_cut() -> None:
    torch.manual_seed(0)
    rows = [(ROWS[0][0], "edema " * 99)] * 2
    trainer = TrainerConfig(batch_size=2, tracker="none")
    peer = DiffusersTraining(model_of(tiny_sd()), rows, trainer, Accelerator(), None)
    assert next(iter(peer.loader))["input_ids"].shape == (2, 77)


def test_frozen_weights_are_cast_and_trained_ones_are_fp32() -> None:
    half = training(mixed_precision="bf16")
    assert {p.dtype for p in half.vae.parameters()} | {p.dtype for p in half.text_encoder.parameters()} == {
        torch.bfloat16
    }
    assert {p.dtype for p in half.unet.parameters()} == {torch.float32} and half.unet.training
    for precision, trained in (("bf16", torch.bfloat16), ("fp16", torch.float32)):
        peer = training(rank=2, mixed_precision=precision)
        lora = {p.dtype for n, p in peer.unet.named_parameters() if "lora_" in n}
        rest = {p.dtype for n, p in peer.unet.named_parameters() if "lora_" not in n}
        assert (lora, rest) == ({trained}, {peers.WEIGHT_DTYPES[precision]}), "as the script leaves them"
        assert len(peer.trained) == sum(p.requires_grad for p in peer.unet.parameters())


def test_a_turn_is_timed_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 100, 100, 1, 2 and 3 s; the loader has three batches, so that the turn goes round it."""
    peer, clock, waited, seconds = training(), [0.0], [], iter([100.0, 100.0, 1.0, 2.0, 3.0, 50.0, 9.0])

    def step(batch: Any) -> None:
        assert peer.unet.training
        clock[0] += next(seconds)

    monkeypatch.setattr(peer, "_step", step)
    monkeypatch.setattr(peers, "synchronize", lambda device: waited.append((device, clock[0])))
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    peer.unet.eval()
    assert peer.turn(2, 3) == 2.0
    cpu = torch.device("cpu")
    assert waited == [(cpu, 200.0), (cpu, 206.0)] and next(seconds) == 50.0
    assert peer.turn(0, 1) == 9.0


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(time.time()))
    peers.synchronize(torch.device("cpu"))
    assert not waited
    peers.synchronize(torch.device("cuda"))
    assert len(waited) == 1


def test_the_peer_obeys_the_options_that_its_script_has() -> None:
    """Else the ratios would compare different things."""
    peer, plain = training(gradient_checkpointing=True, optimizer="adamw8bit"), training()
    assert peer.unet.is_gradient_checkpointing and not plain.unet.is_gradient_checkpointing
    assert [type(one.optimizer.optimizer).__name__ for one in (peer, plain)] == ["AdamW8bit", "AdamW"]
    peer.turn(1, 1)
