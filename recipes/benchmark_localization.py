"""What localization costs, and what it gives, beside the method of Dombrowski et al. and beside
attention-map-diffusers.

    accelerate launch recipes/benchmark_localization.py --config recipes/configs/phantom/benchmark_localization.yaml

The last line is one JSON object. The peer needs torchvision: install both and this project in an environment of its own
(pip install torch==2.14.1 torchvision==0.29.1 attention-map-diffusers) and run this recipe there. Without the peer,
`peer_overhead` is null. The measurements are in distill/experiment/benchmark_localization.py and benchmark_memory.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

import yaml
from pydantic import AfterValidator, Field

from distill.cli import main, to_yaml
from distill.config import BaseConfig, LayerEvaluation
from distill.data_config import AnyData, PhantomData
from distill.settings import Count, Positive, Settings, Text, once

if TYPE_CHECKING:
    from distill.files import JsonObject

Part = Literal["overhead", "paper", "memory", "protocols", "scale", "full_size"]


class BenchmarkLocalizationConfig(Settings):
    """Measure what localization costs and gives, beside other methods.

    accelerate launch recipes/benchmark_localization.py --config recipes/configs/phantom/benchmark_localization.yaml
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "run", "data.kind", "data.root", "parts", "output_dir")
    base: BaseConfig = BaseConfig()
    run: Text | None = None
    """Run folder whose adapters or full weights are put on the base. None takes the base itself."""
    data: AnyData = PhantomData()
    evaluation: LayerEvaluation = LayerEvaluation()
    parts: Annotated[tuple[Part, ...], Field(min_length=1), AfterValidator(once)] = get_args(Part)
    """What to measure. overhead, paper and protocols are of the model; scale is of the base in two processes; full_size
    is of a random denoiser as large as SD 1.5's."""
    repeats: Count = 40
    """overhead: forward passes of each way."""
    memory_budget_gb: Positive = 24.0
    """full_size: memory that the largest batch must fit in, in units of 1e9 bytes."""
    limit_minutes: Positive = 480.0
    """Stop after this time; each part has its share. What was measured by then is in benchmark.json."""
    output_dir: Text = "checkpoints/benchmark_localization"
    """Where benchmark.json and the scores of each pair are written."""
    dry_run: bool = False
    """Check everything, print what would be measured, and stop."""


def scale_options(config: BenchmarkLocalizationConfig) -> list[str]:
    """Options of evaluate.py for the part scale: the same base, data and maps, and as few images as it allows. Writes
    them to a file in output_dir."""
    from distill.files import write_atomic

    few = {"generated_images": 1, "diversity_captions": 1, "diversity_samples": 2, "num_inference_steps": 1}
    same = {name: getattr(config, name).model_dump(mode="json") for name in ("base", "data", "evaluation")}
    path = write_atomic(
        Path(config.output_dir) / "scale.yaml", yaml.safe_dump(same | {"evaluation": same["evaluation"] | few})
    )
    return [f"--config={path}"]


def print_results(results: JsonObject, path: Path) -> None:
    """A line of each protocol and part, and one JSON object at the end."""
    for name, entry in results.get("protocols", {}).items():
        word = entry["word"] if entry else {}
        shown = {key: (word[key], word[f"{key}_ci"]) for key in word if f"{key}_ci" in word and word[key] is not None}
        print(f"{name}: " + ", ".join(f"{key} {value:.3f} {interval}" for key, (value, interval) in shown.items()))
    for part, values in results.items():
        if values:
            print(f"{part}: " + json.dumps({k: v for k, v in values.items() if not isinstance(v, (dict, list))}))
    print(f"all numbers: {path}\nnext: accelerate launch recipes/evaluate.py --evaluation.protocol dombrowski")
    keys = {"paper": ("speedup_vs_paper", "auc_ours", "auc_paper"), "overhead": ("record_overhead", "peer_overhead")}
    keys["memory"] = ("memory_50_over_1",)
    print(json.dumps({key: results.get(part, {}).get(key) for part, names in keys.items() for key in names}))


def benchmark(config: BenchmarkLocalizationConfig) -> None:
    import torch
    from accelerate import Accelerator

    from distill.data.loading import load_dataset
    from distill.errors import UserError
    from distill.evaluation.protocols import queries
    from distill.experiment.benchmark_localization import Subject, jobs_of, measure
    from distill.experiment.run import quiet_libraries
    from distill.files import provenance, write_json
    from distill.models import load_model

    quiet_libraries()
    if config.dry_run:
        print(to_yaml(config))
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("the benchmark times one process, and starts others itself: launch it with --num_processes 1")
    model = load_model(config.base, config.run)
    dataset = load_dataset(config.data, "test")
    asked = queries(dataset, model, config.evaluation.full())
    print(
        f"{len({q.image for q in asked})} held-out images, {sum(len(q.findings) for q in asked)} pairs; "
        f"{torch.get_num_threads()} threads on {accelerator.device.type}; parts: {', '.join(config.parts)}"
    )
    if config.dry_run:
        print("dry run: the data and the base are fine; nothing was written")
        return
    del model
    path, origin = Path(config.output_dir) / "benchmark.json", provenance()

    def write(found: JsonObject) -> None:
        write_json(path, {**found, "config": config.model_dump(mode="json"), "provenance": origin})

    subject = Subject(config.base, config.run, config.data, config.evaluation.full(), Path(config.output_dir))
    jobs = jobs_of(
        subject,
        config.parts,
        repeats=config.repeats,
        budget_gb=config.memory_budget_gb,
        recipe=Path(__file__).with_name("evaluate.py"),
        options=scale_options(config) if "scale" in config.parts else [],
    )
    print_results(measure(jobs, config.limit_minutes, write), path)


if __name__ == "__main__":
    main(benchmark, BenchmarkLocalizationConfig)
