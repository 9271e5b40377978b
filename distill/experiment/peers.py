"""The training loops of diffusers' examples, with their calls, to be timed beside ours.

Source: huggingface/diffusers, examples/text_to_image/train_text_to_image_lora.py and train_text_to_image.py (Apache
2.0), as of August 2026, with the options that the benchmark sets. Images are held in memory as tensors, which spares
the peer the decoding and resizing of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill.config import TrainerConfig
from distill.devices import loader_processes
from distill.models import Model

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Row = tuple[torch.Tensor, str]
"""(3, height, width) pixels in [-1, 1], and a caption."""


def optimizer_class(trainer: TrainerConfig) -> Callable[..., torch.optim.Optimizer]:
    """As --use_8bit_adam chooses it."""
    if trainer.optimizer == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    found: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock is right."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class DiffusersTraining:
    """train_text_to_image_lora.py where `rank` is given, else train_text_to_image.py.

    model: is changed. rows: the training images. One `turn` goes on where the one before ended.
    """

    def __init__(
        self, model: Model, rows: Sequence[Row], trainer: TrainerConfig, accelerator: Accelerator, rank: int | None
    ) -> None:
        self.accelerator, self.trainer = accelerator, trainer
        self.dtype = WEIGHT_DTYPES[trainer.mixed_precision]
        unet, self.vae, self.text_encoder = model.denoiser, model.vae, model.text_encoders[0]
        self.noise_scheduler = DDPMScheduler.from_config(model.noise_scheduler.config)
        tokenizer = model.tokenizers[0]
        self.vae.requires_grad_(False).to(accelerator.device, dtype=self.dtype)
        self.text_encoder.requires_grad_(False).to(accelerator.device, dtype=self.dtype)
        if rank is None:
            unet.requires_grad_(True).to(accelerator.device).train()
        else:
            unet.requires_grad_(False).to(accelerator.device, dtype=self.dtype)
            targets = ["to_k", "to_q", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
            if trainer.mixed_precision == "fp16":
                cast_training_params(unet, dtype=torch.float32)
        if trainer.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = optimizer_class(trainer)(
            self.trained, lr=trainer.learning_rate, weight_decay=trainer.weight_decay, eps=1e-8
        )  # fmt: skip

        def collate(examples: list[Row]) -> dict[str, torch.Tensor]:
            pixel_values = torch.stack([pixels for pixels, _ in examples])
            pixel_values = pixel_values.to(memory_format=torch.contiguous_format).float()
            inputs = [
                tokenizer(
                    text, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids[0]
                for _, text in examples
            ]  # fmt: skip
            return {"pixel_values": pixel_values, "input_ids": torch.stack(inputs)}

        loader: DataLoader[Row] = DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=trainer.batch_size,
            shuffle=True,
            collate_fn=collate,
            num_workers=loader_processes(trainer.num_workers, accelerator.device),
        )
        scheduler = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=10**6)
        self.unet, self.optimizer, self.loader, self.lr_scheduler = accelerator.prepare(
            unet, optimizer, loader, scheduler
        )

    def turn(self, warm_up: int, steps: int, label: str = "diffusers") -> float:
        """Seconds a step, of `steps` steps after `warm_up` others."""
        done, began, bar = 0, 0.0, tqdm(total=warm_up + steps, desc=label, unit="step")
        self.unet.train()
        while True:
            for batch in self.loader:
                if done == warm_up:
                    synchronize(self.accelerator.device)
                    began = time.perf_counter()
                self._step(batch)
                bar.update()
                done += 1
                if done == warm_up + steps:
                    synchronize(self.accelerator.device)
                    bar.close()
                    return (time.perf_counter() - began) / steps

    def _step(self, batch: dict[str, torch.Tensor]) -> None:
        accelerator, vae, scheduler = self.accelerator, self.vae, self.noise_scheduler
        with accelerator.accumulate(self.unet):
            latents = vae.encode(batch["pixel_values"].to(dtype=self.dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            bsz = latents.shape[0]
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (bsz,), device=latents.device).long()
            noisy_latents = scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = self.text_encoder(batch["input_ids"], return_dict=False)[0]
            target = noise
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, timesteps)
            model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
            avg_loss = accelerator.gather(loss.repeat(self.trainer.batch_size)).mean()
            avg_loss.item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.trained, self.trainer.max_grad_norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
