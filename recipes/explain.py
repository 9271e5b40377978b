"""What tells generated from real images: a detector on named features, against real held-out images.

    accelerate launch recipes/explain.py --config recipes/configs/phantom/explain.yaml --run checkpoints/finetune
    accelerate launch recipes/explain.py --config recipes/configs/phantom/explain.yaml --images FOLDER,FOLDER

Writes explain.json, explain.md and figures/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.cli import main, to_yaml
from distill.config import BaseConfig, FullEvaluation
from distill.data_config import AnyData, PhantomData, fit_of
from distill.settings import Batch, Count, Seed, Settings, Text, Texts

if TYPE_CHECKING:
    import torch

    from distill.data.sample import ImageCaptionDataset
    from distill.evaluation.explanation import Pictures
    from distill.models import Model


class Drawing(Settings):
    """How images are drawn of held-out captions."""

    count: Annotated[Count, Field(ge=10)] = 200
    """Real images that are compared, and images of each generated set."""
    sets: Annotated[int, Field(ge=1, le=100)] = 2
    """Generated sets, of the same captions with other seeds. Folders of `images` are a set each."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Denoising steps of an image."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 4.0
    """Classifier-free guidance; at most 1 switches it off."""
    scheduler: Literal["base", "lcm"] = "base"
    """Sampler: the base's own, or LCMScheduler for students of distill_steps.py (with guidance_scale 1)."""
    batch_size: Batch = 16
    """Images at a time. It changes the speed, not the images."""
    seed: Seed = 1234
    """Seed of the images and of the detector; image k uses seed + k."""

    def full(self) -> FullEvaluation:
        options = ("num_inference_steps", "guidance_scale", "scheduler", "batch_size", "seed")
        return FullEvaluation.model_validate(self.model_dump(include=set(options)))


class ExplainConfig(Settings):
    """Say what tells the images of a base, of a run on it, or of any folder from real ones.

    accelerate launch recipes/explain.py --config recipes/configs/phantom/explain.yaml --run RUN
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "run", "images", "data.kind", "data.root", "output_dir")
    base: BaseConfig = BaseConfig()
    run: Text | None = None
    """Run folder whose adapters or full weights are put on the base. None draws images of the base itself."""
    images: Texts = ()
    """Folders of images made by any tool, one a set; nothing is drawn then. They are made squares as the data are."""
    through_vae: bool | None = None
    """Also send real images through the base's VAE, to tell its faults from the denoiser's. None: unless `images` is
    set."""
    gray: bool | None = None
    """Compare in gray: a colour cast would give every image away, and hide all else. None: where real images are
    gray."""
    data: AnyData = PhantomData()
    drawing: Drawing = Drawing()
    output_dir: Text = "checkpoints/explain"
    """Where explain.json, explain.md and figures/ are written."""
    dry_run: bool = False
    """Check everything, print what would be compared, and stop."""

    @model_validator(mode="after")
    def _check(self) -> ExplainConfig:
        if self.images and self.run is not None:
            raise ValueError(f"images is set, so that none are drawn, and run is {self.run}; leave one out")
        return self

    @property
    def with_vae(self) -> bool:
        return not self.images if self.through_vae is None else self.through_vae


def explain(config: ExplainConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.run import quiet_libraries

    quiet_libraries()
    with held(Path(config.output_dir), write=not config.dry_run):
        explain_all(config)


def explain_all(config: ExplainConfig) -> None:
    from accelerate import Accelerator
    from rich.console import Console

    from distill.data.loading import load_dataset
    from distill.data.readers.image_folder import ImageFolder
    from distill.data.readers.records import RecordDataset
    from distill.evaluation.detection import check_installed
    from distill.evaluation.explanation import GENERATED, check_groups, one_of_each_image, real_pictures
    from distill.evaluation.explanation import explain as explained
    from distill.files import provenance, write_json
    from distill.models import load_model
    from distill.report.card import mark_model_card
    from distill.report.explanation import sentences, write_explanation

    accelerator = Accelerator()
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    check_installed()
    test = load_dataset(config.data, "test")
    chosen = one_of_each_image(test, range(len(test)), 2 * config.drawing.count)
    model = None
    if config.with_vae or not config.images:
        model = load_model(config.base, config.run).to(accelerator.device).freeze()
        if isinstance(test, RecordDataset) and not config.images:
            test.check_captions(model)
    sets = sets_of(config, test, chosen[: config.drawing.count], model)
    for files in (one.image for one in sets if isinstance(one.image, ImageFolder) and one.image.left_out):
        used, left = len(files.names), files.left_out
        console.print(f"{files.folder}: {used} of {used + left} images, at random; --drawing.count takes more")
    real = real_pictures(test, chosen)
    check_groups(real.groups, config.drawing.count, [one.groups for one in sets])
    console.print(f"{len(chosen)} real images, and {len(sets)} sets of {len(sets[0].groups)} generated ones")
    compared = min(len(chosen), config.drawing.count)
    if len(chosen) < 2 * compared:
        console.print(
            f"the control, real against real images, has {len(chosen) // 2} a side, and the comparison {compared}: "
            "it would show less"
        )
    if config.dry_run:
        console.print(to_yaml(config) + "dry run: the data and the images are fine; nothing was written")
        return
    comparisons = explained(
        real, config.drawing.count, sets, seed=config.drawing.seed, batch_size=config.drawing.batch_size,
        accelerator=accelerator, gray=config.gray, model=model if config.with_vae else None,
    )  # fmt: skip
    if not accelerator.is_main_process:
        return
    folder = Path(config.output_dir)
    shown = sets[0].image([example["image"] for example in comparisons[GENERATED]["examples"]])
    arrays = ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    origin = provenance() | {"config": config.model_dump(mode="json")}
    write_json(folder / "explain.json", {"comparisons": comparisons, "provenance": origin})
    write_explanation(folder, comparisons, list(arrays))
    said = sentences(comparisons)
    if config.run:
        mark_model_card(Path(config.run), "What tells its images from real ones", " ".join(said))
    console.print("\n".join(said))
    console.print(f"numbers: {folder / 'explain.json'}\nnext: open {folder / 'explain.md'}")


def sets_of(
    config: ExplainConfig, test: ImageCaptionDataset, chosen: Sequence[int], model: Model | None
) -> list[Pictures]:
    """The folders of config.images, or images drawn of the captions of `chosen`."""
    from distill.data.readers.image_folder import ImageFolder
    from distill.data.sample import group_key
    from distill.evaluation.drawing import generate
    from distill.evaluation.explanation import Pictures

    if config.images:
        size, count, fit = config.data.resolution, config.drawing.count, fit_of(config.data)
        folders = [ImageFolder(Path(name), size, count, fit) for name in config.images]
        return [Pictures(folder, folder.names, folder.names) for folder in folders]
    assert model is not None
    options = config.drawing.full()
    groups = [group_key(test, index) for index in chosen]

    def drawn(number: int) -> Pictures:
        def picture(places: Sequence[int]) -> torch.Tensor:
            indices = [chosen[place] for place in places]
            seeds = [options.seed + index + 1_000_003 * number for index in indices]
            captions = [test.caption(index) for index in indices]
            return generate(model, captions, seeds, config.data.resolution, options) * 2 - 1

        return Pictures(picture, groups, [test.caption(index) for index in chosen])

    return [drawn(number) for number in range(config.drawing.sets)]


if __name__ == "__main__":
    main(explain, ExplainConfig)
