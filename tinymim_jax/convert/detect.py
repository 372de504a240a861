"""Which family a file is of, by the names of its tensors and by config.json."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tinymim_jax.convert.conversion import fitting_families
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.families import FAMILIES
from tinymim_jax.convert.families.published import families_of
from tinymim_jax.convert.families.spellings import anchor_of
from tinymim_jax.convert.state_dict import Found, find_state_dict

AUTO = "auto"
_MAX_NESTING = 4
# Families some models of which have the names that usually show the other: DeiT III in timm's names, CoCa's poolers.
_ALIKE = ({"dinov2", "deit3"}, {"clip", "pe"})


def find_weights(
    data: Any, config: Mapping[str, Any], *, use: str | None = None, prefix: str | None = None
) -> tuple[str, Found]:
    """(family, its state dict) of what a file of PyTorch holds.

    Args:
      config: config.json of Hugging Face or timm; {} without one.
      use, prefix: as of `find_state_dict`.

    Raises:
      ConvertError: no Vision Transformer is in it, or several families have its names: the message names the option.
    """
    names = list(names_in(data))
    if any(re.search(r"(^|\.)decode_head\.", name) for name in names):
        found = find_state_dict(data, FAMILIES["tinymim_segmentation"].anchor, use=use, prefix=prefix)
        return (fitting_families(found.state) or ["tinymim_segmentation"])[0], found
    anchor = anchor_of(names)
    if anchor is None:
        raise ConvertError(
            "no Vision Transformer was found in it: none of its tensors is a patch projection of a known name. Of a "
            "known model in another form, the version of timm or Hugging Face can be read"
        )
    found = find_state_dict(data, anchor, use=use or usual_network(data), prefix=prefix)
    if usual_network(data):
        return "ijepa", found
    candidates = families_of({name for name in found.state if isinstance(name, str)}, config)
    if len(candidates) == 1:
        return candidates[0], found
    if candidates:
        raise ConvertError(f"models of {' and '.join(candidates)} have these names: choose by --from {candidates[0]}")
    return _plain(found, config), found


def check_family(family: str, found: Found, config: Mapping[str, Any]) -> None:
    """Raises ConvertError where names show another family of PUBLISHED than the one given, unless config.json says so.

    Families differ in what tensors do not show, such as eps and rotary positions.
    """
    names = {name for name in found.state if isinstance(name, str)}
    shown = families_of(names, {})
    alike = {each for group in _ALIKE if group & set(shown) for each in group}
    if shown and family not in {*shown, *alike, *families_of(names, config)}:
        raise ConvertError(
            f"--from {family}: the names of its tensors are those of {' and '.join(shown)}, whose models compute "
            f"something else: --from {shown[0]}, or auto"
        )


def usual_network(data: Any) -> str | None:
    """I-JEPA's files hold two encoders; its paper evaluates the moving average."""
    both = isinstance(data, Mapping) and {"encoder", "target_encoder"} <= set(data)
    return "target_encoder" if both else None


def _plain(found: Found, config: Mapping[str, Any]) -> str:
    """The family of a plain ViT with timm's names, which releases with different numbers of heads share."""
    fitting = fitting_families(found.state)
    if len(fitting) == 1:
        return fitting[0]
    of_others = re.search(r"teacher|student|base_encoder|momentum", found.place)
    if "vit" in fitting and ("architecture" in config or of_others):
        return "vit"
    if not fitting:
        return "vit"  # its error lists what differs
    raise ConvertError(
        f"models of {', '.join(fitting)} have these names, with other attention heads in the last block: choose by "
        f"--from {' or --from '.join(fitting)} (mae: MAE's pre-trained encoders; tinymim: TinyMIM's release; vit: "
        "any other)"
    )


def names_in(data: Any, depth: int = 0) -> Iterator[str]:
    """All keys of nested dicts."""
    if isinstance(data, Mapping) and depth < _MAX_NESTING:
        for key, value in data.items():
            if isinstance(key, str):
                yield key
            yield from names_in(value, depth + 1)
