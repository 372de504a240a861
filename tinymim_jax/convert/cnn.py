"""ConvNeXt and ResNet of timm, torchvision and their authors, which are read as teachers only."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable

# By kind: names that only such a network has, of all sources, and what its files may have besides.
_SIGNS = {
    "convnext": r"(stages\.0\.blocks\.0\.conv_dw|stages\.0\.0\.dwconv)\.weight",
    "resnet": r"layer1\.0\.conv1\.weight",
}
_IGNORED = r".*num_batches_tracked|head\..*|fc\..*|norm\.(weight|bias)"
# The authors' names of ConvNeXt (and DINOv3's), in timm's.
_TIMM = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
)
_KNOWN = {
    "convnext": (
        r"stem\.[01]\.(weight|bias)|stages\.\d\.downsample\.[01]\.(weight|bias)|stages\.\d\.blocks\.\d+\."
        r"((conv_dw|norm|mlp\.fc[12])\.(weight|bias)|gamma)"
    ),
    "resnet": (
        r"conv1\.weight|(layer[1-4]\.\d+\.)?bn\d\.(weight|bias|running_(mean|var))|layer[1-4]\.\d+\."
        r"(conv[1-3]\.weight|downsample\.0\.weight|downsample\.1\.(weight|bias|running_(mean|var)))"
    ),
}


def kind_of(names: set[str]) -> str | None:
    """'convnext' or 'resnet' for the names of a state dict, None for other models."""
    found = [kind for kind, sign in _SIGNS.items() if any(re.fullmatch(sign, name) for name in names)]
    return found[0] if found else None


def find_cnn(data: Any) -> Mapping[str, Any] | None:
    """The state dict of a ConvNeXt or ResNet in what a file holds, at its top or one level below; None without one."""
    candidates = [data, *(data.values() if isinstance(data, Mapping) else ())]
    for state in candidates:
        if isinstance(state, Mapping) and kind_of({name for name in state if isinstance(name, str)}):
            return state
    return None


def from_cnn(state: Mapping[str, Any], image_size: tuple[int, int] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"backbone": the architecture, see models.cnn.ConvNet}, {"backbone": parameters}).

    Parameters have PyTorch's names; kernels of convolutions are [row, column, in, out], of linear layers [in, out].

    Raises ConvertError for other names or shapes: a network of another design (ResNet-D, SE, ConvNeXt V2, ...).
    """
    kind = kind_of(set(state))
    if kind is None:
        raise ConvertError("the file holds neither a ConvNeXt nor a ResNet")
    params: dict[str, Any] = {}
    strange = []
    for name, array in state.items():
        for pattern, replacement in _TIMM if kind == "convnext" else ():
            name = re.sub(pattern, replacement, name)
        if re.fullmatch(_KNOWN[kind], name) and isinstance(array, np.ndarray):
            *folders, leaf = name.split(".")
            node = params
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = np.array(_ours(array, name), np.float32, order="C", copy=True)
        elif not re.fullmatch(_IGNORED, name):
            strange.append(printable(name))
    if strange:
        raise ConvertError(
            f"these tensors are not known of a {kind}: {', '.join(sorted(strange)[:8])}. Read are ConvNeXt (not V2) "
            "and the ResNets of torchvision"
        )
    try:
        widths, blocks = _sizes(kind, params)
    except (KeyError, IndexError) as error:
        raise ConvertError(f"the file does not hold a whole {kind}: {error} is missing") from error
    record = {"kind": kind, "widths": widths, "blocks": blocks, "image_size": list(image_size or (224, 224))}
    _check_shapes(record, params)
    return {"backbone": record}, {"backbone": params}


def _check_shapes(record: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Traces the network with these parameters, which fails where one is missing or of another shape."""
    import jax  # here because nothing else in this package needs it

    from tinymim_jax.models.cnn import ConvNet

    network = ConvNet.from_record(dict(record))
    image = jax.ShapeDtypeStruct((1, *network.image_size, 3), np.float32)
    try:
        jax.eval_shape(network.stages, params, image)
    except (KeyError, TypeError, ValueError) as error:
        raise ConvertError(
            f"the file does not hold a {record['kind']} of a known design (missing tensors, grouped convolutions as in "
            f"ResNeXt, or others): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _ours(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 4 and ".mlp." in name:  # 1 x 1 convolutions in place of linear layers
        array = array[:, :, 0, 0]
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def _sizes(kind: str, params: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(width, number of blocks) of each stage."""
    if kind == "convnext":
        stages = [params["stages"][str(i)]["blocks"] for i in range(len(params["stages"]))]
        widths = [len(stage["0"]["norm"]["weight"]) for stage in stages]
    else:
        stages = [params[f"layer{i}"] for i in range(1, 1 + sum(name.startswith("layer") for name in params))]
        last = "bn3" if "bn3" in stages[0]["0"] else "bn2"
        widths = [len(stage["0"][last]["weight"]) for stage in stages]
    for stage in stages:
        for j in range(len(stage)):
            _ = stage[str(j)]
    return widths, [len(stage) for stage in stages]
