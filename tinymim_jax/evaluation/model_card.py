"""The README.md of a model on the Hugging Face hub: figures, preprocessing, use, where the weights come from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tinymim_jax.convert.files import LICENCES
from tinymim_jax.convert.formats.hub import in_timm
from tinymim_jax.convert.formats.network import Network, size_of
from tinymim_jax.tasks.distill.teachers import TEACHERS

# Licences with conditions for what is made from the weights, beside those with "nc" in their names.
_RESTRICTED = ("dinov3-license", "apple-amlr", "apple-ascl", "nvidia-open-model-license")
_LONGEST = 8
_CITATION = """## Citation

```bibtex
@inproceedings{ren2023tinymim,
  title = {TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models},
  author = {Ren, Sucheng and Wei, Fangyun and Zhang, Zheng and Hu, Han},
  booktitle = {CVPR},
  year = {2023}
}
```"""


def lineage(checkpoint: str) -> list[dict[str, Any]]:
    """Where the weights come from, newest first, as far as it can be followed on this machine.

    Each step has `name`, and some of: `task`, `teacher`, `teacher NAME` and `init` (names of checkpoints), `file` and
    `sha256` (of a converted file), `licence`, `settings` (of the training), `result` (its figures).
    """
    steps: list[dict[str, Any]] = []
    waiting, seen = [epath.Path(checkpoint).expanduser()], set()
    while waiting and len(steps) < _LONGEST:
        path = waiting.pop(0)
        if str(path) in seen:
            continue
        seen.add(str(path))
        record, config = _json(path / "model.json"), _json(path / "config.json")
        step: dict[str, Any] = {"name": path.name}
        source = record.get("source", {})
        step |= {key: source[key] for key in ("file", "sha256", "family") if key in source}
        licence = record.get("licence") or source.get("licence") or LICENCES.get(source.get("family", ""))
        if licence:
            step["licence"] = licence
        if config:
            step |= {"task": config.get("task"), "settings": _settings(config), "result": _json(path / "result.json")}
        for kind, other in _ancestors(record, config).items():
            step[kind] = epath.Path(other).name
            waiting.append(epath.Path(other).expanduser())
        if "licence" not in step and path.name in TEACHERS and not path.exists():
            step |= {"licence": licence} if (licence := TEACHERS[path.name].licence) else {}
        steps.append(step)
    return steps


def licence_of(checkpoint: str, given: str | None = None) -> str:
    """The licence to state: the one given; else the strictest that is known of the lineage, or 'other'."""
    if given:
        return given
    known = [step["licence"] for step in lineage(checkpoint) if "licence" in step]
    # Ancestors that are not on this machine are listed in the checkpoint's own record.
    record = _json(epath.Path(checkpoint).expanduser() / "model.json")
    known += [item["licence"] for item in record.get("lineage", ()) if item.get("licence")]
    restricted = [each for each in known if "nc" in each.split("-") or each in _RESTRICTED]
    return (restricted or known or ["other"])[0]


def model_card(checkpoint: str, network: Network, *, licence: str, name: str, suites: Sequence[str] = ()) -> str:
    """The text of README.md.

    Args:
      suites: files that `tinymim evaluate --suite ... --output` wrote.
      name: of the folder.
    """
    steps = lineage(checkpoint)
    encoder = network.record["encoder"]
    tasks = {step.get("task") for step in steps} - {None}
    distilled = "distill" in tasks
    made = "distilled with [TinyMIM](https://arxiv.org/abs/2301.01296)" if distilled else "trained"
    made = f"{made} in tinymim-jax" if tasks else "converted by tinymim-jax from the weights named below"
    tagged = [*(["tinymim"] if distilled else []), "vit", "jax", *(["timm"] if in_timm(network.record) else [])]
    pipeline = "image-classification" if network.output == "logits" else "image-feature-extraction"
    library = "timm" if in_timm(network.record) else "transformers"
    heads = encoder["heads"]
    last = encoder.get("switches", {}).get("last_dim")
    wide = f" ({last} in the last block)" if last else ""
    shown = heads[0] if len(set(heads)) == 1 else " ".join(map(str, heads))
    parts = [
        "\n".join(
            [
                "---",
                f"license: {licence}",
                f"library_name: {library}",
                f"pipeline_tag: {pipeline}",
                "tags:",
                *(f"- {tag}" for tag in tagged),
                "---",
            ]
        ),
        f"# {name}",
        f"A ViT of width {encoder['embed_dim']}{wide}, {encoder['depth']} blocks, attention heads {shown}, patches of "
        f"{encoder['patch_size']} pixels and {size_of(network.used_params()) // 4 / 1e6:.2f} M parameters, {made}.",
        _figures(steps, suites),
        _preprocessing(network),
        _use(network, name),
        _origin(steps, licence),
        _CITATION if distilled else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ancestors(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoints that went into one, by their part in it."""
    found = {"init": config.get("init"), "probed": record.get("probe", {}).get("checkpoint")}
    task = config.get("task")
    teacher = config.get(task or "", {}) if isinstance(task, str) else {}
    section = teacher if isinstance(teacher, Mapping) else {}
    more = {f"teacher {name}": settings for name, settings in (section.get("teachers") or {}).items()}
    for kind, settings in ({"teacher": section.get("teacher") or {}} | more).items():
        found[kind] = settings.get("path") or settings.get("name")
    return {kind: str(path) for kind, path in found.items() if path}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    data, train, optim = (config.get(part, {}) for part in ("data", "train", "optim"))
    wanted = {
        "data": f"{data.get('source')} {data.get('train_split')}",
        "labelled images" if config.get("task") == "classify" else "images": data.get("examples") or None,
        "target": config.get("distill", {}).get("target"),
        "duration": train.get("duration"),
        "batch size": train.get("batch_size"),
        "base learning rate": optim.get("base_lr"),
        "image size": config.get("model", {}).get("image_size"),
        "seed": config.get("seed"),
    }
    # A folder on the author's machine says nothing to others; its last part may.
    wanted["data"] = " ".join(word.rpartition("/")[2] for word in wanted["data"].split())
    return {name: value for name, value in wanted.items() if value is not None}


def _figures(steps: Sequence[Mapping[str, Any]], suites: Sequence[str]) -> str:
    rows = [(f"evaluation split: {name}", _number(name, value)) for name, value in steps[0].get("result", {}).items()]
    for file in suites:
        results = _json(epath.Path(file).expanduser())
        if "suites" not in results:
            raise ValueError(f"--suites {file}: not a file that `tinymim evaluate --suite ... --output` wrote")
        for suite, found in results["suites"].items():
            rows += [
                (f"{suite}: {name}", _number(name, found[name])) for name in ("top1", "top5", "ece") if name in found
            ]
    if not rows:
        return ""
    return "\n".join(["## Figures", "", "| figure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{100 * value:.2f} %" if "top" in name and value <= 1 else f"{value:.5g}"


def _preprocessing(network: Network) -> str:
    seen = network.preprocessing
    height, width = seen["image_size"]
    mean, std = (", ".join(f"{x:.4g}" for x in seen[name]) for name in ("mean", "std"))
    names = network.class_names
    classes = f" {len(names)} classes: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}." if names else ""
    return (
        f"## Preprocessing\n\nThe short side to {seen['resize']} pixels ({seen['interpolation']}, antialiased), the "
        f"central {height}x{width}, pixels scaled to 0..1, then `(x - mean) / std` with mean ({mean}) and "
        f"std ({std}).{classes}"
    )


def _use(network: Network, name: str) -> str:
    load = f"NAME/{name}"
    kind = "AutoModelForImageClassification" if network.output == "logits" else "AutoModel"
    if in_timm(network.record):
        code = [
            "import timm",
            f'model = timm.create_model("hf-hub:{load}", pretrained=True).eval()  # a folder: "local-dir:{name}"',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            "",
            f"from transformers import {kind}",
            f'model = {kind}.from_pretrained("{load}")',
        ]
        note = ""
    else:
        code = [
            f"from transformers import AutoImageProcessor, {kind}",
            f'processor = AutoImageProcessor.from_pretrained("{load}")',
            f'model = {kind}.from_pretrained("{load}", trust_remote_code=True)',
        ]
        note = "timm has no model of this architecture; modeling_tinymim.py in this repository is its code.\n\n"
    shell = [
        f"tinymim convert --from hub --input {name} --output {name}_jax",
        f"tinymim predict {name}_jax PICTURE.jpg",
        f"tinymim export {name}_jax --to onnx --output {name}.onnx",
        f"hf upload {load} {name}",
    ]
    python, bash = "\n".join(code), "\n".join(shell)
    return f"## Use\n\n{note}```python\n{python}\n```\n\nIn tinymim-jax, and back to the hub:\n\n```bash\n{bash}\n```"


def _origin(steps: Sequence[Mapping[str, Any]], licence: str) -> str:
    lines = ["## Where the weights come from", ""]
    for step in steps:
        words = [f"**{step['name']}**"]
        if step.get("task"):
            words.append(f"trained (task `{step['task']}`)")
        for role in ("teacher", "init", "probed"):
            words += [f"{kind} `{name}`" for kind, name in step.items() if kind.split()[0] == role]
        if "file" in step:
            words.append(f"converted from `{step['file']}` ({step.get('family')}), sha256 `{step.get('sha256')}`")
        words.append(f"licence {step['licence']}" if "licence" in step else "licence not recorded")
        lines.append("- " + ", ".join(words))
        if step.get("settings"):
            lines.append("  - " + ", ".join(f"{name} {value}" for name, value in step["settings"].items()))
    lines += [
        "",
        f"Licence of these weights as stated by their author: {licence}. A student learned from its teacher's "
        "features; whether the teacher's licence extends to it is a legal question that this card does not answer.",
    ]
    return "\n".join(lines)


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
