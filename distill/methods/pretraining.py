"""Objectives of the bundled base's other stages: text encoder, autoencoder, classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from distill import draws
from distill.methods.base import Terms


class ContrastiveObjective(nn.Module):
    """Match of captions and pictures, as CLIP: symmetric cross-entropy of the cosine similarities of a batch.

    Source: Radford et al. 2021, figure 3. `text_encoder` is a CLIPTextModelWithProjection, `image_encoder` maps
    (batch, 3, height, width) to (batch, projection_dim).
    """

    def __init__(self, text_encoder: nn.Module, image_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Terms:
        text = F.normalize(self.text_encoder(batch["input_ids"]).text_embeds, dim=-1)
        image = F.normalize(self.image_encoder(batch["pixel_values"]), dim=-1)
        logits = self.logit_scale.clamp(max=4.6).exp() * text @ image.T
        target = torch.arange(len(text), device=text.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        return {"loss": loss, "accuracy": accuracy}


class AutoencoderObjective(nn.Module):
    """Reconstruction of pictures with a small KL to the unit Gaussian, as in latent diffusion (Rombach et al. 2022).

    L = mean |x - y| + mean (x - y)^2 + kl_weight * KL(q(z|x) || N(0, 1)) / number of pixels, on random square crops.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float, crop_px: int) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.crop_px = vae, kl_weight, crop_px

    def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Terms:
        pixels = batch["pixel_values"]
        span = pixels.shape[-1] - self.crop_px + 1
        top, left = (int(v) for v in torch.randint(span, (2,), generator=generator))
        pixels = pixels[..., top : top + self.crop_px, left : left + self.crop_px]
        posterior = self.vae.encode(pixels).latent_dist
        noise = draws.normal(posterior.mean.shape, generator).to(pixels.device)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        l1, mse = F.l1_loss(reconstruction, pixels), F.mse_loss(reconstruction, pixels)
        kl = posterior.kl().sum() / pixels.numel()
        psnr = 10 * torch.log10(4 / mse)
        return {"loss": l1 + mse + self.kl_weight * kl, "mse": mse, "kl": kl, "psnr_db": psnr}


class ClassificationObjective(nn.Module):
    """Binary cross-entropy of each finding. `classifier`: (batch, 3, height, width) -> .logits (batch, findings)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Terms:
        logits = self.classifier(batch["pixel_values"]).logits
        loss = F.binary_cross_entropy_with_logits(logits, batch["labels"])
        return {"loss": loss, "accuracy": ((logits > 0) == batch["labels"].bool()).float().mean()}
