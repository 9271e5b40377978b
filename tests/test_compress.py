"""Smaller U-Nets: what stays, of what it is made, and that it is taught layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from full_size import ARCHITECTURES, full_size
from pair import in_two_processes
from recipe import recipe_module, refusal_of
from test_recipes import MAPS_ONLY, PHANTOM, TRAINING, UNET_FILE, files_of, log_rows, read_metrics
from tiny import save_tiny, tiny_sd, tiny_sdxl
from torch import nn
from training import batch_of, distilling, generator

from distill.attention.recording import attention_layers, record_attention
from distill.cli import parse, to_yaml
from distill.config import BaseConfig, BlocksConfig, LoraConfig
from distill.errors import UserError
from distill.experiment.derive import derived_base
from distill.losses import token_attention_kl
from distill.models import blocks as pruning
from distill.models.adapters import parameter_counts, prepare_training
from distill.models.blocks import model_size, name_in_teacher, pruned_config, pruned_subset, pruned_unet
from distill.models.export import export, prove_parity
from distill.models.family import AttentionSubset, Model
from distill.models.loading import load_model, model_of

RECIPE = recipe_module("compress")
BASE = BlocksConfig(layers_per_block=1)
SMALL = BlocksConfig(layers_per_block=1, remove_mid_block=True)
TINY = BlocksConfig(layers_per_block=1, remove_mid_block=True, remove_stages=1)


def two_pairs(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    """As Stable Diffusion: two pairs a stage, and innermost a stage of the width of the one before, without
    attention."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(config | options)).eval()


def pipeline_of_two_pairs() -> StableDiffusionPipeline:
    pipeline = tiny_sd()
    pipeline.register_modules(unet=two_pairs())
    return pipeline


# --- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "published"),
    [(BASE, 579_384_964), (SMALL, 482_346_884), (TINY, 323_384_964)],
    ids=["base", "small", "tiny"],
)
def test_of_stable_diffusion_it_makes_the_published_bk_sdm(blocks: BlocksConfig, published: int) -> None:
    """BK-SDM's table 1: 0.58, 0.49 (rounded up) and 0.33 thousand million parameters, here to the last one."""
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(pruned_config(full_size("sd15").denoiser.config, blocks))
    assert parameter_counts(student)[0] == published
    stages = 3 if blocks.remove_stages else 4
    assert tuple(student.config.down_block_types) == ARCHITECTURES["sd15"].unet["down_block_types"][:stages]
    assert (student.mid_block is None) == blocks.remove_mid_block
    assert [len(block.resnets) for block in student.up_blocks] == [2] * stages


def identity_pairs(unet: UNet2DConditionModel, *, mid_block: bool) -> None:
    """Let what BK-SDM takes out pass its input on: the second pair of each stage, the middle one of each up stage."""
    pairs = [(block, 1) for block in (*unet.down_blocks, *unet.up_blocks)]
    residual = [block.resnets[place] for block, place in pairs]
    attention = [block.attentions[place] for block, place in pairs if hasattr(block, "attentions")]
    if mid_block:
        residual += list(unet.mid_block.resnets)
        attention += list(unet.mid_block.attentions)
    for block in residual:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        if block.conv_shortcut is not None:  # of the input and the skip that is joined to it, take the input
            width = len(block.conv_shortcut.weight)
            block.conv_shortcut.weight.data.zero_()
            block.conv_shortcut.weight.data[:, :width, 0, 0] = torch.eye(width)
            nn.init.zeros_(block.conv_shortcut.bias)
    for block in attention:
        nn.init.zeros_(block.proj_out.weight)
        nn.init.zeros_(block.proj_out.bias)


@pytest.mark.parametrize("blocks", [BASE, SMALL], ids=["base", "small"])
def test_blocks_that_did_nothing_are_not_missed(blocks: BlocksConfig) -> None:
    """So every block that stays has the weights, the input and the skip that it had in the teacher."""
    teacher = two_pairs()
    identity_pairs(teacher, mid_block=blocks.remove_mid_block)
    student = pruned_unet(teacher, blocks).eval()
    assert parameter_counts(student)[0] < 0.7 * parameter_counts(teacher)[0]
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 77, 16)
    with torch.no_grad():
        torch.testing.assert_close(student(x, t, text).sample, teacher(x, t, text).sample)
    untouched = two_pairs()
    with torch.no_grad():
        assert not torch.allclose(pruned_unet(untouched, blocks)(x, t, text).sample, untouched(x, t, text).sample)


def test_every_block_of_fewer_stages_is_one_of_the_teachers() -> None:
    teacher = two_pairs()
    student = pruned_unet(teacher, TINY)
    there = name_in_teacher(student.config, teacher.config)
    assert there("up_blocks.0.attentions.1.transformer_blocks.0.attn2") == (
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2"
    )
    assert there("up_blocks.0") == "up_blocks.1" and there("down_blocks.1.resnets.0") == "down_blocks.1.resnets.0"
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[there(name)]), name
    assert student(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 16)).sample.shape == (1, 4, 8, 8)


def test_transformer_layers_of_sdxl_become_fewer() -> None:
    with torch.device("meta"):
        teacher = full_size("sdxl").denoiser
        student = UNet2DConditionModel.from_config(pruned_config(teacher.config, BlocksConfig(transformer_layers=4)))
    assert student.config.transformer_layers_per_block == [1, 2, 4]
    there = name_in_teacher(student.config, teacher.config)
    assert {there(name) for name in attention_layers(student)} < set(attention_layers(teacher))
    assert len(attention_layers(student)) == 70 - 6 * 6, "six blocks of 10 layers are left with 4"


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (BlocksConfig(), "nothing is removed; set blocks.layers_per_block"),
        (BlocksConfig(layers_per_block=2), "blocks.layers_per_block is 2, and the U-Net has 2; give a smaller number"),
        (BlocksConfig(transformer_layers=3), "blocks.transformer_layers is 3, and the U-Net has 1"),
        (BlocksConfig(remove_stages=3), "the U-Net has 3 stages; one must stay"),
        (BlocksConfig(remove_stages=2, remove_mid_block=True), "do not fit each other"),
        (BlocksConfig(remove_stages=1), "set blocks.remove_mid_block true as well"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(blocks: BlocksConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        pruned_unet(two_pairs(), blocks)


def test_transformer_layers_of_a_lopsided_unet_stay() -> None:
    teacher = two_pairs()
    teacher.register_to_config(reverse_transformer_layers_per_block=[1, 1, 1])
    with pytest.raises(UserError, match="reverse_transformer_layers_per_block is not supported"):
        pruned_unet(teacher, BlocksConfig(transformer_layers=1))


def test_a_missing_middle_block_cannot_be_removed() -> None:
    student = pruned_unet(two_pairs(), SMALL)
    with pytest.raises(UserError, match="the U-Net has no middle block"):
        pruned_unet(student, BlocksConfig(remove_mid_block=True))


def test_what_is_left_of_the_chosen_layers() -> None:
    teacher = two_pairs()
    student = pruned_unet(teacher, BASE)
    there = name_in_teacher(student.config, teacher.config)
    layers = attention_layers(teacher)
    last = "up_blocks.2.attentions.2.transformer_blocks.0.attn2"
    gone = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    assert {last, gone} < set(layers)
    subset = pruned_subset(AttentionSubset((gone, last), (100,)), student, there)
    assert subset == AttentionSubset(("up_blocks.2.attentions.1.transformer_blocks.0.attn2",), (100,))
    assert pruned_subset(AttentionSubset((gone,), (100,)), student, there) is None
    assert pruned_subset(None, student, there) is None


# --- how large it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, pipeline_of_two_pairs])
def test_operations_are_those_of_a_real_pass(build: Any) -> None:
    """Counted apart, from the inputs of every matrix product: layers of a real pass by hooks, attention by its
    sizes."""
    model = model_of(build())
    unet, counted = model.denoiser, 0

    def of_layer(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal counted
        inner = module.weight[0].numel()
        places = output.numel() // len(output) if isinstance(module, nn.Conv2d) else output.numel()
        counted += 2 * inner * places * (len(output) if isinstance(module, nn.Conv2d) else 1)

    def of_attention(module: Any, inputs: Any, keywords: Any, output: torch.Tensor) -> None:
        nonlocal counted
        queries = inputs[0].shape[1]
        context = keywords.get("encoder_hidden_states")
        keys = queries if context is None else context.shape[1]
        counted += 2 * 2 * queries * keys * module.inner_dim

    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(of_layer)
        if type(module).__name__ == "Attention":
            module.register_forward_hook(of_attention, with_kwargs=True)
    side, added = 64 // model.vae_factor, None
    if model.family.reads_size:
        added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        unet(
            torch.zeros(1, 4, side, side),
            5,
            torch.zeros(1, 77, unet.config.cross_attention_dim),
            added_cond_kwargs=added,
        )
    assert model_size(model, 128)["denoiser_gflops"] > counted / 1e9, "an image of another size"
    size = model_size(model, 64)
    assert size["denoiser_gflops"] == pytest.approx(counted / 1e9, rel=1e-6)
    assert size["denoiser_parameters"] == parameter_counts(unet)[0]


# --- how it is taught -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "left"), [(SMALL, 6), (TINY, 6)], ids=["small", "tiny"])
def test_each_layer_learns_from_the_layer_that_it_was(blocks: BlocksConfig, left: int) -> None:
    teacher, student = model_of(pipeline_of_two_pairs()), model_of(pipeline_of_two_pairs())
    student.denoiser = pruned_unet(teacher.denoiser, blocks)
    prepare_training(student, denoiser="full", text_encoder="frozen", lora=LoraConfig())
    there = name_in_teacher(student.denoiser.config, teacher.denoiser.config)
    batch = batch_of(student)
    layers = [there(name) for name in attention_layers(student.denoiser)]
    assert len(layers) == left < len(attention_layers(teacher.denoiser)) == 11
    with distilling(student, teacher, output_weight=1.0, feature_weight=1.0) as method:
        terms = method(batch, generator())
        terms["loss"].backward()
        x = method.noised(batch, generator())
    found = []
    for model, names in ((student, None), (teacher, layers)):
        with record_attention(model.denoiser, names or ()) as maps, torch.no_grad():
            method.predict(model, student.text_encoders, x)
        found.append(dict(maps.by_layer))
    ours, theirs = found
    rows = torch.ones(4, dtype=torch.bool)
    expected = [token_attention_kl(theirs[there(name)], maps, rows) for name, maps in ours.items()]
    assert float(terms["token_kl"].detach()) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert float(terms["feature"].detach()) > 0 and float(terms["output"].detach()) > 0
    assert all(p.grad is not None for p in student.denoiser.parameters() if p.requires_grad)


# --- the recipe -----------------------------------------------------------------------------------------------------


def compress(argv: list[str]) -> None:
    RECIPE.compress(parse(RECIPE.CompressConfig, argv))


def test_a_run_of_adapters_becomes_a_smaller_model_that_stock_diffusers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters -> compress.py -> stock loading; the same command again does nothing."""
    pipeline_of_two_pairs().save_pretrained(tmp_path / "base")
    teacher_run, out = tmp_path / "teacher", tmp_path / "out"
    adapted = load_model(BaseConfig(name=str(tmp_path / "base")))
    prepare_training(adapted, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2))
    for module in (adapted.denoiser, *adapted.text_encoders):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    export(adapted, teacher_run)
    argv = ["--base.name", str(tmp_path / "base"), "--run", str(teacher_run), "--output_dir", str(out), *TRAINING]
    argv += ["--blocks.layers_per_block", "1", "--blocks.remove_mid_block", "true", "--text_encoder", "full"]
    argv += ["--method.mass_weight", "0.5", "--bits", "[int8,nf4]", "--data.cache_dir", str(tmp_path / "cache")]
    argv += MAPS_ONLY
    compress(argv)
    metrics = read_metrics(out)
    assert list(metrics["arms"]) == ["teacher", "pruned", "model", "model_int8", "model_nf4"]
    stored = [entry["size"]["megabytes"] for entry in metrics["arms"].values()]
    assert stored[0] > stored[1] == stored[2] > stored[3] > stored[4]
    words = [entry["localization"]["word"]["auc"] for entry in metrics["arms"].values()]
    assert len(set(words)) == 5, "each is another model"
    sizes = [metrics["arms"][name]["size"]["denoiser_parameters"] for name in ("teacher", "pruned", "model")]
    assert sizes[0] > sizes[1] == sizes[2]
    removed = parameter_counts(two_pairs())[0] - sizes[1]  # the teacher's adapters are no part of its U-Net's size here
    said = " ".join(capsys.readouterr().out.split())
    ratio = sizes[1] / (sizes[1] + removed)
    assert f"parameters {ratio:.2f}, operations" in said and "cross-attention layers 6 of 11" in said
    speed = json.loads((out / "speed.json").read_text())["denoiser_seconds_a_pass"]
    assert min(speed["model"], speed["teacher"]) > 0
    terms = log_rows(out / "model/train_log.jsonl")[-1]
    assert terms["loss"] == pytest.approx(
        terms["denoising"] + 0.5 * terms["mass"] + terms["output"] + terms["feature"],
        rel=1e-4,
    )
    # The teacher's adapters are in the student that it starts from.
    teacher = load_model(BaseConfig(name=str(tmp_path / "base")), run=teacher_run)
    teacher.pipeline.fuse_lora()
    start = UNet2DConditionModel.from_pretrained(out / "pruned_base" / "unet")
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    fused = teacher.denoiser.get_submodule(query).base_layer.weight
    torch.testing.assert_close(start.get_submodule(query).weight, fused)

    trained = load_model(BaseConfig(name=str(out / "pruned_base")), run=out)
    stock = StableDiffusionPipeline.from_pretrained(
        out / "pruned_base",
        unet=UNet2DConditionModel.from_pretrained(out / "unet"),
        text_encoder=type(trained.text_encoders[0]).from_pretrained(out / "text_encoder"),
        safety_checker=None,
    )
    prove_parity(trained, model_of(stock), "cpu")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{out.name}/pruned_base" in card and "blocks.remove\\_mid\\_block" in card
    assert "trainer.max\\_steps 2" in card and "lora.rank" not in card and str(tmp_path) not in card

    kept = {name: (out / name).read_bytes() for name in (f"unet/{UNET_FILE}", f"pruned_base/unet/{UNET_FILE}")}
    files = files_of(out)
    compress(argv)
    assert {name: (out / name).read_bytes() for name in kept} == kept and files_of(out) == files


def _rank(rank: int, folder: str) -> None:
    """One of two processes: makes the same base in earnest, as a dry run, and for a command that is refused."""
    root = Path(folder)
    argv = ["--base.name", str(root / "base"), "--blocks.remove_mid_block", "true", "--output_dir"]

    def change(model: Any) -> Any:
        with (root / "written").open("a") as log:
            log.write(f"{rank}\n")
        return model

    def found(config: Any, keep: bool = False) -> str:
        with derived_base(config, config.run, "derived", change) as base:
            assert (Path(base.name) / "model_index.json").exists()
            if keep:
                (Path(config.output_dir) / "config.yaml").write_text(to_yaml(config))
        return base.name

    names = [
        found(parse(RECIPE.CompressConfig, [*argv, str(root / name)]), keep=name == "out")
        for name in ("out", "refused")
    ]
    names.append(found(parse(RECIPE.CompressConfig, [*argv, str(root / "dry"), "--dry_run", "true"])))
    (root / f"names-{rank}.json").write_text(json.dumps(names))


def test_one_of_two_processes_writes_what_both_read(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    in_two_processes(_rank, str(tmp_path))
    names = [json.loads((tmp_path / f"names-{rank}.json").read_text()) for rank in (0, 1)]
    assert names[0] == names[1] and (tmp_path / "written").read_text() == "0\n0\n0\n"
    assert (Path(names[0][0]) / "unet" / UNET_FILE).exists()
    assert not any(Path(name).exists() for name in names[0][1:]), "of what ends before its training nothing stays"


def test_a_compression_that_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(argv: list[str]) -> str:
        return refusal_of(RECIPE.compress, RECIPE.CompressConfig, argv, capsys)

    save_tiny(tmp_path / "base")
    argv = ["--base.name", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), *PHANTOM]
    pruned = [*argv, "--blocks.remove_mid_block", "true"]
    for words in (
        ["--method.start_from_teacher", "true"], ["--method.teacher", "x"], ["--method.gate_reference", "base"],
    ):  # fmt: skip
        assert "the teacher is the whole model, base and run" in refusal([*pruned, *words])
    assert "nothing is removed" in refusal(argv)
    assert not (tmp_path / "out").exists(), "of what is refused nothing stays"
    # Another choice of blocks after a refusal, in the same folder: not the blocks of the refused command.
    again = [*pruned, *TRAINING, "--data.cache_dir", str(tmp_path / "cache")]
    assert "data.resolution is 60" in refusal([*again, "--data.resolution", "60"])
    assert not (tmp_path / "out").exists()
    compress([*again, "--dry_run", "true"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out/pruned_base/unet").mkdir(parents=True)  # of a command that was killed
    assert "is a whole pipeline" in refusal([*again, "--run", str(tmp_path / "base")])
    compress(again)
    assert read_metrics(tmp_path / "out")["arms"]["model"]["cost"]["steps"] == 2


def test_a_pass_is_timed_as_the_median_of_turns_after_two(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two of each model take 900 s; then 1, 2, 3 ... s and 10 times as long."""
    clock, passes, asked = [0.0], {"one": 0, "other": 0}, []

    def model_named(name: str, scale: float) -> Any:
        def predict(denoiser: Any, *inputs: Any) -> torch.Tensor:
            passes[name] += 1
            clock[0] += 900.0 if passes[name] <= 2 else scale * (passes[name] - 2)
            return torch.zeros(())

        def example_inputs(model: Any, batch: int, side: int, device: torch.device) -> tuple[Any, ...]:
            asked.append((batch, side, device))
            return ()

        family = SimpleNamespace(predict=predict, example_inputs=example_inputs)
        return SimpleNamespace(denoiser=sd.denoiser, vae_factor=8, family=family)

    monkeypatch.setattr(pruning.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(pruning, "TIMED_PASSES", 3)
    found = pruning.seconds_a_pass({"one": model_named("one", 1.0), "other": model_named("other", 10.0)}, 64, 4)
    assert found == {"one": 2.0, "other": 20.0} and passes == {"one": 5, "other": 5}
    assert set(asked) == {(4, 8, torch.device("cpu"))}
