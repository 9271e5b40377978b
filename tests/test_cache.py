from __future__ import annotations

import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

import distill.data.cache as cache_module
from distill.data.cache import cache_latents, cache_text_embeddings, model_fingerprint
from distill.data.sample import Sample
from distill.errors import UserError


def build_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).requires_grad_(False)


class Rows:
    """Images whose content is a function of their seed; every third caption names a side."""

    def __init__(self, seeds: list[int]) -> None:
        self.findings: tuple[str, ...] = ()
        self.query_words: dict[str, tuple[str, ...]] = {}
        self.seeds = seeds
        self.reads = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        noise = torch.Generator().manual_seed(self.seeds[index])
        return Sample(str(index), torch.rand(3, 16, 16, generator=noise) * 2 - 1, self.caption(index))

    def caption(self, index: int) -> str:
        return "left effusion" if index % 3 == 0 else "both lungs are clear"

    def labels(self, index: int) -> tuple[str, ...]:
        return ()

    def fingerprint(self, index: int) -> str:
        return f"seed {self.seeds[index]}"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return build_vae()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)


def fill(rows: Rows, vae: AutoencoderKL, folder: Path, flip: bool = True, batch_size: int = 3):
    return cache_latents(rows, vae, folder, batch_size=batch_size, flip=flip, device="cpu")


def test_rows_are_the_posterior_of_their_image_and_of_its_mirror(vae: AutoencoderKL, tmp_path: Path) -> None:
    rows = Rows(list(range(10)))
    cache = fill(rows, vae, tmp_path)
    assert len(cache) == 10
    for index in range(10):
        pixels = rows[index].pixel_values[None]
        posterior = vae.encode(pixels).latent_dist
        mean, std = cache[index]
        torch.testing.assert_close(mean, posterior.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std, posterior.std[0], atol=1e-5, rtol=1e-5)
        mirrored = cache.flipped(index)
        assert (mirrored is None) == (index % 3 == 0)
        if mirrored is not None:
            torch.testing.assert_close(
                mirrored[0], vae.encode(pixels.flip(-1)).latent_dist.mean[0], atol=1e-5, rtol=1e-5
            )
    with pytest.raises(IndexError):
        cache[10]
    assert fill(rows, vae, tmp_path, flip=False).flipped(1) is None


def test_only_what_changed_is_encoded_again(vae: AutoencoderKL, tmp_path: Path) -> None:
    first = Rows(list(range(10)))
    fill(first, vae, tmp_path)
    assert first.reads == 10
    same = Rows(list(range(10)))
    fill(same, vae, tmp_path, batch_size=2)
    assert same.reads == 0
    changed = Rows([*range(5), 99, *range(6, 10)])
    cache = fill(changed, vae, tmp_path)
    assert changed.reads == 4  # one shard
    expected = vae.encode(changed[5].pixel_values[None]).latent_dist.mean[0]
    torch.testing.assert_close(cache[5][0], expected, atol=1e-5, rtol=1e-5)
    unmirrored = Rows(list(range(10)))
    fill(unmirrored, vae, tmp_path, flip=False)
    assert unmirrored.reads == 10, "files without mirrored rows are others"
    again = Rows(list(range(10)))
    assert fill(again, vae, tmp_path).flipped(1) is not None and again.reads == 0
    other = Rows(list(range(10)))
    fill(other, build_vae(seed=1), tmp_path)
    assert other.reads == 10


def test_writing_to_a_row_does_not_change_the_cache(vae: AutoencoderKL, tmp_path: Path) -> None:
    cache = fill(Rows([0, 1]), vae, tmp_path)
    before = cache[0][0].clone()
    cache[0][0].zero_()
    assert torch.equal(cache[0][0], before)
    assert torch.equal(pickle.loads(pickle.dumps(cache))[0][0], before)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "other checksum"])
def test_a_damaged_file_is_built_again(vae: AutoencoderKL, tmp_path: Path, damage: str) -> None:
    expected = fill(Rows([0, 1, 2]), vae, tmp_path)[2][0]
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "other checksum":
        save_file({"mean": torch.zeros(3, 4, 8, 8)}, path, metadata={"crc32": "00000000"})
    else:
        data[-5] ^= 64
        path.write_bytes({"truncated": data[:-9], "flipped bit": data, "empty": b""}[damage])
    rows = Rows([0, 1, 2])
    assert torch.equal(fill(rows, vae, tmp_path)[2][0], expected)
    assert rows.reads == 3


def test_a_full_disk_leaves_no_file_and_says_what_to_do(tmp_path: Path) -> None:
    """A limit on the size of a file makes the write itself fail, as a full disk does."""
    limit_bytes = 1_000_000
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*data\.cache_dir"):
            cache_text_embeddings(["a"], lambda captions: torch.zeros(1, limit_bytes), tmp_path, "model", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fill(Rows([0]), vae, tmp_path / "cache")


def test_what_a_killed_process_left_is_removed_later(vae: AutoencoderKL, tmp_path: Path) -> None:
    for name, age_s in (("old.tmp", 7200), ("young.tmp", 60)):
        (tmp_path / name).write_bytes(b"half")
        modified = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (modified, modified))
    fill(Rows([0]), vae, tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["young.tmp"]


def test_latents_that_are_not_finite_stop(tmp_path: Path) -> None:
    vae = build_vae()
    next(iter(vae.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        fill(Rows([0]), vae, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_stored_as_such(tmp_path: Path) -> None:
    mean, std = fill(Rows([0]), build_vae().to(torch.bfloat16), tmp_path)[0]
    assert mean.dtype == std.dtype == torch.bfloat16


def test_fingerprint_is_of_weights_and_config_only(vae: AutoencoderKL, tmp_path: Path) -> None:
    assert model_fingerprint(build_vae(0)) == model_fingerprint(vae) != model_fingerprint(build_vae(1))
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert model_fingerprint(loaded) == model_fingerprint(vae)
    half = model_fingerprint(loaded.half())
    assert half != model_fingerprint(vae)
    last = list(loaded.parameters())[-1]
    last.data.view(-1)[0] += 1
    assert model_fingerprint(loaded) != half


def test_text_is_encoded_once_a_distinct_caption(tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(captions)
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return lengths[:, None, None].expand(-1, 7, 5), lengths[:, None]

    captions = ["", "a", "a", "ccc", "é", "dddd", "ffffff", "a"]
    cache = cache_text_embeddings(captions, encode, tmp_path, "model", 4)
    assert len(cache) == 6 and sorted(asked) == sorted(set(captions))
    for caption in captions:
        hidden, pooled = cache[caption]
        assert hidden.shape == (7, 5) and pooled.shape == (1,)
        assert (hidden == len(caption)).all() and (pooled == len(caption)).all()
    cache_text_embeddings(captions, encode, tmp_path, "model", 1)
    assert len(asked) == 6
    cache_text_embeddings(captions, encode, tmp_path, "another model", 1)
    assert len(asked) == 12
    with pytest.raises(KeyError):
        cache["not asked for"]


def test_a_single_embedding_comes_back_as_a_tensor(tmp_path: Path) -> None:
    cache = cache_text_embeddings(["a", "b"], lambda captions: torch.ones(len(captions), 3, 2), tmp_path, "model", 2)
    single = cache["b"]
    assert isinstance(single, torch.Tensor) and single.shape == (3, 2)
    assert len(cache_text_embeddings([], lambda captions: torch.ones(0), tmp_path, "model", 2)) == 0
