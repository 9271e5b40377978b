"""Key-locking: keys of cross-attention from the text encoder as it was, values from the one that is trained.

Where a word looks is decided by keys, what it draws there by values. A trained text encoder moves both, and the maps
are lost. With locked keys it moves the maps only through the queries of later layers. The price is a forward pass of a
text encoder; no teacher is needed. After training, `merge_keys` gives the keys back to the trained encoder, in closed
form, so that the export is a stock denoiser and a stock text encoder, or adapters of both.
Source: Perfusion, Tewel et al. 2023 (arXiv 2305.01644), which locks keys per concept and to its class.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill import draws
from distill.data.batch import Batch
from distill.errors import raise_all
from distill.files import JsonObject
from distill.methods.base import Context, Method, ParameterGroups, Terms
from distill.methods.options import KeyLockOptions, LockedTokens
from distill.tokens import EOS, PADDING, WORD

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedTokenizerBase

    from distill.methods.training import Training
    from distill.models import Model

MERGE_CAPTIONS = 2000
"""Training captions that the merge is fitted on, where there are as many."""
RIDGE = 1e-4
"""Of the mean square of the hidden states: pulls the merge to the identity where captions say nothing."""
LEAST_SPREAD = 1e-3
"""Of tokens that a linear map can be judged by, relative to their mean square."""


class KeyLockedTextEncoder(nn.Module):
    """Two text encoders in place of one: every hidden state is (batch, tokens, 2 * width), the frozen encoder's, then
    the trained one's. All else (pooled states, config) is the trained one's. Only `trained` ever has gradients.

    The first half is what locked keys see: `tokens` says of which tokens it is the frozen encoder's; `unlocked`, 0 to
    1, how far it has passed over to the trained one's. ends: the id of the token that ends a caption.
    """

    def __init__(self, frozen: nn.Module, trained: nn.Module, tokens: LockedTokens = "all", ends: int = -1) -> None:
        super().__init__()
        self.frozen, self.trained = frozen.requires_grad_(False).eval(), trained
        self.tokens, self.ends, self.unlocked = tokens, ends, 0.0

    @property
    def config(self) -> Any:
        return self.trained.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.trained.dtype  # type: ignore[assignment]
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.trained.device  # type: ignore[assignment]
        return device

    def train(self, mode: bool = True) -> KeyLockedTextEncoder:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        out = self.trained(input_ids, **options)
        reference = out
        if self.unlocked < 1:
            with torch.no_grad():
                reference = self.frozen(input_ids, **options)
        for key in ("last_hidden_state", "hidden_states"):
            ours, theirs = out.get(key), reference.get(key)
            if isinstance(ours, tuple):
                pairs = zip(theirs, ours, strict=True)
                out[key] = tuple(torch.cat([self._seen(a, b, input_ids), b], dim=-1) for a, b in pairs)
            elif ours is not None:
                out[key] = torch.cat([self._seen(theirs, ours, input_ids), ours], dim=-1)
        return out

    def _seen(self, theirs: torch.Tensor, ours: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """What locked keys see. theirs, ours: states of the frozen and of the trained encoder, (batch, tokens,
        width)."""
        if self.unlocked:
            theirs = theirs + self.unlocked * (ours - theirs)
        if self.tokens == "all":
            return theirs
        tail = (input_ids == self.ends).cumsum(dim=1) > 0
        return torch.where((tail if self.tokens == "words" else ~tail)[..., None], ours, theirs)


@dataclass(frozen=True)
class Merged:
    """By token group, how much of the hidden states that locked keys saw is restored on held-out captions, 1 for all.
    r2: by the merge. r2_unmerged: by the trained encoder as it is; a merge that is below it has failed."""

    r2: dict[str, float]
    r2_unmerged: dict[str, float]


def lock_faults(model: Model) -> list[str]:
    """Why the keys of these model cannot be locked; empty where they can."""
    if model.denoiser.config.get("encoder_hid_dim") is None:
        return []
    return ["lock_keys: this U-Net projects the text before its cross-attention (encoder_hid_dim)"]


def _end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a caption, BERT's included; padding comes after the first."""
    ids = [found for found in (tokenizer.eos_token_id, tokenizer.sep_token_id) if isinstance(found, int)]
    return ids[0] if ids else -1


class KeyLock:
    """The lock of one model: the hooks that part the hidden states, and the encoders to give back. layers: the locked
    ones."""

    def __init__(
        self, model: Model, frozen: Sequence[nn.Module], layers: Sequence[str] = (), tokens: LockedTokens = "all"
    ) -> None:
        """Lock `model` in place: its text encoders, its pipeline's and its U-Net. frozen: the encoders that the keys
        see. layers: prefixes of those that are locked; empty locks all. tokens: those whose keys are locked. After
        adapters are attached, since the hooks are on the outermost module of each projection.
        Raises UserError for a U-Net that projects the text itself, and for a prefix that matches nothing."""
        ends = [_end_of(tokenizer) for tokenizer in model.tokenizers]
        endless = (
            ["locked_tokens: a tokenizer has no token that ends a caption"] if tokens != "all" and -1 in ends else []
        )
        raise_all("the keys cannot be locked", [*lock_faults(model), *endless])
        self.model, self.trained = model, list(model.text_encoders)
        self.layers = _cross_attention(model.denoiser, layers)
        pairs = zip(frozen, self.trained, ends, strict=True)
        self.joint = [KeyLockedTextEncoder(theirs, ours, tokens, end) for theirs, ours, end in pairs]
        keys: list[int] = []
        values: list[int] = []
        start = 0
        for encoder in self.trained:
            width = encoder.config.hidden_size
            keys += range(start, start + width)
            values += range(start + width, start + 2 * width)
            start += 2 * width
        self.columns = (torch.tensor(keys), torch.tensor(values))
        self.handles: list[RemovableHandle] = []
        for name in _cross_attention(model.denoiser):
            layer = model.denoiser.get_submodule(name)
            seen = self.columns if name in self.layers else (self.columns[1], self.columns[1])
            for module, columns in zip((layer.to_k, layer.to_v), seen, strict=True):
                self.handles.append(module.register_forward_pre_hook(_select(columns)))
        self._place(self.joint)

    @property
    def unlocked(self) -> float:
        """How far the keys have passed over to the trained encoders, 0 to 1."""
        return self.joint[0].unlocked

    def unlock(self, share: float) -> None:
        for encoder in self.joint:
            encoder.unlocked = share

    def _place(self, encoders: Sequence[nn.Module]) -> None:
        self.model.text_encoders[:] = encoders
        for name, encoder in zip(self.model.family.text_encoder_names, encoders, strict=True):
            setattr(self.model.pipeline, name, encoder)

    def release(self) -> None:
        """The trained encoders alone again; keys see them, as they are."""
        for handle in self.handles:
            handle.remove()
        self._place(self.trained)


def _select(columns: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal columns
        if columns.device != inputs[0].device:  # once: a copy at every call would wait for the device
            columns = columns.to(inputs[0].device)
        return (inputs[0].index_select(-1, columns), *inputs[1:])

    return hook


def lock_keys(
    model: Model, dtype: torch.dtype = torch.float32, *, layers: Sequence[str] = (), tokens: LockedTokens = "all"
) -> KeyLock:
    """Before the first training step and after prepare_training, which knows nothing of the lock. dtype: of the copies
    that the keys see. layers, tokens: see KeyLock."""
    return KeyLock(model, [copy.deepcopy(encoder).to(dtype) for encoder in model.text_encoders], layers, tokens)


@torch.no_grad()
def merge_keys(
    lock: KeyLock, captions: Sequence[str], *, rank: int | None = None, batch_size: int = 32, progress: bool = True
) -> Merged:
    """Give the keys back to the trained encoder, and release the lock.

    With x and y the hidden states of the trained and the frozen encoder, W is the linear map with W x closest to y in
    least squares over the tokens of nine in ten of `captions` and the empty one (each token group counts alike, or
    padding would be all), pulled to the identity by RIDGE. Every locked to_k becomes to_k W. Values are untouched.

    rank: where the projections are LoRA layers, W - 1 is the best map of this rank (reduced-rank regression, Izenman
    1975), so that the adapter `default` of to_k takes it in exactly, by as many ranks more. Not for other layers.
    """
    model = lock.model
    gram, cross, held = _moments(lock, captions, batch_size, progress)
    eye = torch.eye(len(gram), dtype=torch.float64)
    gram += RIDGE * gram.diagonal().mean() * eye
    change = torch.linalg.solve(gram, cross).T
    if rank is not None:
        basis = torch.linalg.eigh(change @ gram @ change.T).eigenvectors[:, -rank:]
        factors = (basis, basis.T @ change)
        change = factors[0] @ factors[1]
    merge = eye + change
    r2, unmerged = _explained(held, merge)
    for name in lock.layers:
        projection = model.denoiser.get_submodule(name).to_k
        if rank is None:
            projection.weight.copy_(projection.weight.cpu().double() @ merge)
        else:
            all_alike = lock.layers == _cross_attention(model.denoiser)
            ranks = {"attn2.to_k" if all_alike else f"{name}.to_k": _widen(projection, *factors)}
            adapter = model.denoiser.peft_config["default"]
            adapter.rank_pattern, adapter.alpha_pattern = adapter.rank_pattern | ranks, adapter.alpha_pattern | ranks
    lock.release()
    return Merged(r2, unmerged)


Held = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
"""Token group -> hidden states of the trained and of the frozen encoder, of the captions that are held out."""


def _moments(
    lock: KeyLock, captions: Sequence[str], batch_size: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor, Held]:
    """Sums of x'x and of x'(y - x), in which each token group counts alike, and the states of every tenth caption that
    is not among the others."""
    model = lock.model
    key_columns, value_columns = lock.columns
    texts = [*captions, *[""] * max(1, len(captions) // 50)]
    width = len(key_columns)
    groups = [model.token_groups(text) for text in texts]
    codes = torch.stack(groups)
    share = {int(code): float((codes == code).double().mean()) for code in codes.unique()}
    gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    held: Held = {code: [] for code in share}
    # A caption that is fitted elsewhere would tell nothing where it is held out.
    seen = {text for place, text in enumerate(texts) if place % 10 or place >= len(captions)}
    new = torch.tensor([text not in seen for text in texts])
    device = model.denoiser.device
    from tqdm.auto import tqdm

    for start in tqdm(range(0, len(texts), batch_size), desc="merging keys", unit="batch", disable=not progress):
        part = texts[start : start + batch_size]
        states, _ = model.encode([ids.to(device) for ids in model.tokenize(part)])
        states = states.cpu().double()
        x, y = states[..., value_columns], states[..., key_columns]
        places = torch.arange(start, start + len(part))
        out = (places % 10 == 0) & (places < len(captions))
        for code, amount in share.items():
            chosen = codes[start : start + len(part)] == code
            fitted, kept = chosen & ~out[:, None], chosen & (out & new[places])[:, None]
            a, b = x[fitted], (y - x)[fitted]
            gram += a.T @ a / amount
            cross += a.T @ b / amount
            held[code].append((x[kept], y[kept]))
    return gram, cross, held


def _explained(held: Held, merge: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """R^2 of y on held-out captions by token group: of x merge', and of x as it is."""
    r2: dict[str, float] = {}
    unmerged: dict[str, float] = {}
    for name, code in (("words", WORD), ("eos", EOS), ("padding", PADDING)):
        if held.get(code):
            x, y = (torch.cat(states) for states in zip(*held[code], strict=True))
            spread = (y - y.mean(dim=0)).pow(2).sum()
            if spread > 0:  # one token alone has none
                r2[name] = float(1 - (y - x @ merge.T).pow(2).sum() / spread)
                unmerged[name] = float(1 - (y - x).pow(2).sum() / spread)
    return r2, unmerged


def _widen(layer: Any, left: torch.Tensor, right: torch.Tensor) -> int:
    """A LoRA layer of weight w + s B A becomes, as an adapter of w, (w + s B A) (1 + left right). Returns its rank."""
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    a, b = down.weight.cpu().double(), up.weight.cpu().double() * layer.scaling["default"]
    whole = layer.base_layer.weight.cpu().double() + b @ a
    wide = {"lora_A": torch.cat([a, right]), "lora_B": torch.cat([b, whole @ left], dim=1)}
    for name, weight in wide.items():
        old = getattr(layer, name)["default"]
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(old.weight)
        new.weight.copy_(weight)
        getattr(layer, name)["default"] = new
    size = len(wide["lora_A"])
    layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"] = size, size, 1.0
    return size


def _cross_attention(denoiser: nn.Module, prefixes: Sequence[str] = ()) -> list[str]:
    from distill.attention import attention_layers

    return attention_layers(denoiser, prefixes)


class KeyLocked(Method):
    """Fine-tune with locked keys, and merge them at the end. Adapters of to_k then have twice the rank."""

    options: KeyLockOptions

    def faults(self, student: Model, training: Training) -> list[str]:
        faults = lock_faults(student)
        _cross_attention(student.denoiser, self.options.locked_layers)
        if training.text_encoder == "frozen":
            faults.append("method key_lock locks keys to the text encoder as it was; set text_encoder to full or lora")
        if training.denoiser == "frozen":
            faults.append("method key_lock merges keys into the denoiser; set denoiser to full or lora")
        targets = training.lora.denoiser_targets or student.family.adapter_targets("denoiser")
        if training.denoiser == "lora" and not {"to_k", "attn2.to_k"} & set(targets):
            faults.append("lora.denoiser_targets must hold to_k, whose adapters take in the keys at the end")
        return faults

    def setup(self, student: Model, context: Context) -> None:
        layers, tokens = self.options.locked_layers, self.options.locked_tokens
        self._lock = lock_keys(student, context.frozen_dtype, layers=layers, tokens=tokens)
        self._context = context
        for name in () if self.options.train_keys else self._lock.layers:
            student.denoiser.get_submodule(name).to_k.requires_grad_(False)
        super().setup(student, context)
        if self.options.readable_weight > 0:
            width = len(self._lock.columns[0])
            self.reader = nn.Linear(width, width, bias=False, device=context.device)
            nn.init.eye_(self.reader.weight)

    def parameter_groups(
        self, learning_rate: float, text_encoder_learning_rate: float, text_encoder_steps: int | None = None
    ) -> ParameterGroups:
        groups = super().parameter_groups(learning_rate, text_encoder_learning_rate, text_encoder_steps)
        reads = self.options.readable_weight > 0
        return [*groups, *([{"params": [self.reader.weight], "lr": learning_rate, "until": None}] if reads else [])]

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.options.release_after_steps is None else {"unlocked": torch.tensor(self._lock.unlocked)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._lock.unlock(float(state["unlocked"]))

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        if self.options.release_after_steps is not None:
            since = draws.step_of(generator) - self.options.release_after_steps
            self._lock.unlock(min(1.0, max(0.0, since / self.options.release_over_steps)))
        x = self.noised(batch, generator)
        text = self.embeddings(self.student, list(self.text_encoders), x)
        loss = self.denoising_loss(self.predict_student(x.on(text.embeds, text.pooled)), x)
        if self.options.readable_weight == 0:
            return {"loss": loss, "denoising": loss}
        unreadable = self._unreadable(text.embeds, x.groups)
        return {"loss": loss + self.options.readable_weight * unreadable, "denoising": loss, "unreadable": unreadable}

    def _unreadable(self, embeds: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Mean over token groups of |W x - y|^2 / |y - mean y|^2, with x and y as in `merge_keys` and W the trained `reader`.

        embeds: (batch, tokens, 2 * width), see KeyLockedTextEncoder. groups: (batch, tokens). A group of tokens that are
        alike is left out; 0 where all are.
        """
        with torch.autocast(embeds.device.type, enabled=False):
            keys, values = (embeds[..., columns.to(embeds.device)].float() for columns in self._lock.columns)
            shares = []
            for code in (WORD, EOS, PADDING):
                y, x = keys[groups == code].detach(), values[groups == code]
                spread = (y - y.mean(dim=0)).pow(2).sum()
                # Of captions that are alike, or one, there is nothing to tell apart.
                if spread > LEAST_SPREAD * y.pow(2).sum():
                    shares.append((self.reader(x) - y).pow(2).sum() / spread)
            return torch.stack(shares).mean() if shares else 0.0 * self.reader(values).sum()

    def finish(self) -> JsonObject:
        """Merge the keys; key_lock.json says how well that went."""
        from distill.files import write_json

        context = self._context
        if context.dry_run or self._lock.unlocked == 1:  # keys that see the trained encoder need no merge
            self._lock.release()
            return {}
        started = time.perf_counter()
        adapter = getattr(self.student.denoiser, "peft_config", {}).get("default")
        captions = context.captions(MERGE_CAPTIONS)
        merged = merge_keys(self._lock, captions, rank=adapter.r if adapter else None, progress=context.is_main)
        found = asdict(merged) | {"seconds": time.perf_counter() - started}
        if context.is_main:
            write_json(context.log_dir / "key_lock.json", found)
        free = {"all": (), "words": ("eos", "padding"), "tail": ("words",)}[self.options.locked_tokens]
        fits = ", ".join(
            f"{name} {value:.2f} ({merged.r2_unmerged[name]:.2f} if they were not merged)"
            for name, value in merged.r2.items()
            if name not in free
        )
        context.say(
            "the locked keys are merged into the weights, so that the export is a plain model; R^2 on other captions: "
            f"{fits or 'not measured, as they all repeat'}; {context.log_dir / 'key_lock.json'}"
        )
        worse = [name for name, value in merged.r2.items() if value < merged.r2_unmerged[name] and name not in free]
        if worse:
            context.say(
                f"warning: for {', '.join(worse)} the merge is worse than none; compare the maps, or train shorter"
            )
        return found
