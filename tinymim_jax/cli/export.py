"""`tinymim export`: writes a checkpoint for other programs."""

import argparse
import pathlib
import sys

from tinymim_jax.cli.convert import FAMILIES
from tinymim_jax.runtime.startup import print_line

HELP = "write a checkpoint for another runtime (onnx, litert, stablehlo), the hub, or PyTorch"

# evaluation.exporting.PROGRAMS, which takes seconds to import.
PROGRAMS = ("onnx", "litert", "stablehlo", "hub")
# Extensions of the files; all other formats have .safetensors, and the hub's is a folder.
_EXTENSIONS = {"onnx": ".onnx", "litert": ".tflite", "stablehlo": ".stablehlo", "hub": ""}
# Extensions by which other programs choose how to read a file.
_KNOWN = (".onnx", ".tflite", ".stablehlo", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".h5")

_EPILOG = """\
onnx       one graph for any batch size, opset 17 or 23; needs 'tinymim-jax[onnx]'
litert     TensorFlow Lite for one batch size, without TensorFlow; needs 'tinymim-jax[litert]'
stablehlo  what jax.export.deserialize loads, on CPU, GPU and TPU; needs 'tinymim-jax[stablehlo]'
hub        a folder that timm, transformers and `tinymim convert --from hub` load, with a model card
others     .safetensors with the tensor names of PyTorch code: those of MAE's or TinyMIM's release, of TinyMIM*-T, or of
           timm (vit). Its metadata have head counts, preprocessing and class names, which `tinymim convert` reads back
original   .safetensors with the names of the file that a model of another family was converted from

The exported program is run in its own runtime, where that is installed, against jax; the largest difference is printed,
and a float32 file that differs by more than 2e-6 of the largest output (with segmentation's head mask: 1e-5) is not
kept.

  tinymim export runs/b_finetuned --to onnx --output tinymim_b.onnx
  tinymim export runs/b_finetuned --to onnx --int8 --data imagenet2012@validation --output tinymim_b_int8.onnx
  tinymim export runs/b --to stablehlo --features mean --output features.stablehlo
  tinymim export runs/camvid --to onnx --class_map --output street.onnx
  tinymim export runs/b_finetuned --to hub --suites results.json --output tinymim-b
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `export` command."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("checkpoint", help="workdir of a run, a student in it, or what `tinymim convert` wrote")
    formats = (*PROGRAMS, *FAMILIES, "original")
    command.add_argument("--to", dest="format", required=True, choices=formats, help="format, see below")
    command.add_argument("--output", required=True, metavar="PATH", help="file to write; for the hub a new folder")
    programs = command.add_argument_group("onnx, litert, stablehlo, hub")
    output = programs.add_mutually_exclusive_group()
    output.add_argument(
        "--features",
        choices=("mean", "cls", "tokens"),
        help="export the encoder: the mean of its patch tokens, its CLS token, or all tokens (default: class logits)",
    )
    output.add_argument(
        "--class_map",
        action="store_true",
        help="onnx, stablehlo: of a segmentation, the class of every pixel of a window (default: logits on its grid)",
    )
    programs.add_argument(
        "--int8", action="store_true", help="onnx, litert: int8 weights, one scale per channel; inputs rounded in use"
    )
    programs.add_argument("--opset", type=int, choices=(17, 23), help="onnx: 17 (default), or 23 with Attention")
    programs.add_argument("--batch", type=int, metavar="N", help="litert: images of one call (default 1)")
    programs.add_argument("--licence", help="hub: of the weights, as the hub writes it: apache-2.0, cc-by-nc-4.0")
    programs.add_argument("--suites", nargs="+", metavar="FILE", help="hub: results of `tinymim evaluate --suite`")
    compared = command.add_argument_group("what the exported program is compared with jax on")
    compared.add_argument("--data", metavar="NAME@SPLIT", help="a data set (default: the run's evaluation split)")
    compared.add_argument("--images", nargs="+", metavar="FILE", help="image files")
    compared.add_argument("--data_dir", help="where data sets are (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")


def run(options: argparse.Namespace) -> int:
    """Writes --output and prints a description and its largest difference from jax."""
    _check_extension(options.format, options.output)
    if options.format in PROGRAMS:
        from tinymim_jax.evaluation.exporting import export

        lines = export(
            options.checkpoint,
            options.format,
            options.output,
            features=options.features,
            class_map=options.class_map,
            int8=options.int8,
            data=options.data,
            images=options.images or (),
            data_dir=options.data_dir,
            licence=options.licence,
            suites=options.suites or (),
            opset=options.opset,
            batch=options.batch,
        )
        for line in lines:
            print_line(line)  # also where the reader has left: the file is not in its place yet
        return 0
    given = [name for name in _ONLY_PROGRAMS if getattr(options, name)]
    if given:
        raise ValueError(f"--{given[0]} is for --to {', '.join(PROGRAMS)}, not for {options.format}")
    return _write_weights(options)


def _check_extension(to: str, output: str) -> None:
    """Raises ValueError for the extension of another format."""
    path, right = pathlib.PurePath(output), _EXTENSIONS.get(to, ".safetensors")
    if path.suffix.lower() in _KNOWN and path.suffix.lower() != right:
        what = f"a {right} file" if right else "a folder"
        raise ValueError(f"--to {to} writes {what}, not {path.suffix}: give --output {path.with_suffix(right)}")


_ONLY_PROGRAMS = ("features", "class_map", "int8", "opset", "batch", "licence", "suites", "data", "images", "data_dir")


def _write_weights(options: argparse.Namespace) -> int:
    """Writes a safetensors file; warnings go to standard error."""
    from tinymim_jax.checkpoints.params import load_params
    from tinymim_jax.convert import FORMATS

    model, params = load_params(options.checkpoint)
    for message in FORMATS[options.format](options.output, model, params):
        print(message, file=sys.stderr)
    print(f"{options.output}: {options.format} names, as PyTorch loads them with safetensors.torch.load_file")
    return 0
