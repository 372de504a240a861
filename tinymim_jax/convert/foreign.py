"""Conversion of the families of `families/published.py`: their parameters, their architecture, and the way back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.families.entries import to_ours, to_theirs
from tinymim_jax.convert.families.published import PUBLISHED
from tinymim_jax.convert.families.spellings import ANCHORS, IGNORED, anchor_of, block_entries, fits, outer_entries
from tinymim_jax.convert.foreign_architecture import Hints, Known, foreign_architecture
from tinymim_jax.convert.foreign_head import Head, find_head, head_entries

_MAX_LISTED = 8
_BUFFERS = re.compile(
    r"mask_token|position_ids|relative_position_index|num_batches_tracked|bias_mask|rope\b.*|rope_embed"
)
_MASKED, _SHARED = "qkv.bias_mask", "rel_pos_bias.relative_position_bias_table"


def from_foreign(
    name: str, state: Mapping[str, Any], config: Mapping[str, Any], hints: Hints
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The architecture and parameters of a state dict, and what to record about its source.

    Args:
      name: of the family, in PUBLISHED.
      state: arrays by name, without a prefix.
      config: Hugging Face's or timm's config.json; {} without one.

    Raises:
      ConvertError: unknown names, missing or misshapen tensors (listed), or something that must be given: the message
        names the option.
    """
    rewritten = _rewritten(state)
    flat, used, unread = _read(rewritten)
    head = find_head(name, rewritten, flat, config) if "encoder/patch_embed/kernel" in flat else None
    for found in head.entries if head else ():
        flat |= zip(found.ours, to_ours(found, [rewritten[one] for one in found.torch]))
        unread = [one for one in unread if one not in found.torch]
        used.append(list(found.torch))
    ignored = [key for key in unread if IGNORED.fullmatch(key)]
    if strange := [printable(key) for key in unread if key not in ignored]:
        shown = ", ".join(strange[:_MAX_LISTED]) + ", ..." * (len(strange) > _MAX_LISTED)
        raise ConvertError(f"these tensors are not known of a {name!r} model: {shown}")
    if "encoder/patch_embed/kernel" not in flat or "encoder/blocks_0/norm1/scale" not in flat:
        raise ConvertError(f"the file does not hold a {name!r} model: it has no patch projection or no blocks")
    _split_leading(flat, config)
    encoder, assumed = foreign_architecture(Known(name, PUBLISHED[name], flat, state, config, hints))
    params: dict[str, Any] = {}
    for path, array in flat.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.array(array, np.float32, order="C", copy=True)
    model: dict[str, Any] = {"encoder": encoder}
    if head and head.entries:
        model["classifier"] = _classifier(head, encoder)
    _check_shapes(name, model, params)
    source: dict[str, Any] = {"names": used}
    if any(key.endswith(_MASKED) for key in state):
        source["masked_k_bias"] = True
    if _SHARED in state:
        source["shared_relative_bias"] = True
    if assumed:
        source["assumed"] = assumed
    if ignored:
        source["not_read"] = _groups(ignored)
    if head and head.why_not:
        source["not_read"].append(f"of these, the head is {head.why_not}")
    return model, params, source


def to_foreign(model: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict with the names that the model was read from: bit for bit the tensors that were read.

    Raises:
      ConvertError: the model was not read from such a file.
    """
    source = model.get("source", {})
    if "names" not in source:
        raise ConvertError("this model was not read from a file of its family, so the names of its tensors are unknown")
    used = {tuple(names) for names in source["names"]}
    flat = {path: np.asarray(array, np.float32) for path, array in _flatten(params)}
    encoder = model["encoder"]
    stems = {name.partition(".{i}.")[0] for names in used for name in names if ".{i}." in name}
    if any("patch_generator" in names[0] for names in used) and "encoder/registers" in flat:
        flat["encoder/leading"] = np.concatenate([flat.pop("encoder/cls_token"), flat.pop("encoder/registers")], axis=1)
    state: dict[str, np.ndarray] = {}
    for found in (*outer_entries(), *head_entries(), *(e for stem in stems for e in block_entries(stem))):
        if found.torch not in used:
            continue
        for i in range(encoder["depth"] if "{i}" in found.torch[0] else 1):
            paths = [path.format(i=i) for path in found.ours]
            if all(path in flat for path in paths):
                tensors = to_theirs(found, [flat.pop(path) for path in paths], encoder["patch_size"])
                names = [name.format(i=i) for name in found.torch]
                state |= {key: np.asarray(x, order="C") for key, x in zip(names, tensors, strict=True)}
    if flat:
        raise ConvertError(f"these parameters have no names in the file's layout: {', '.join(sorted(flat)[:8])}")
    if source.get("masked_k_bias"):
        _mask_again(state)
    if source.get("shared_relative_bias"):
        tables = [state.pop(key) for key in list(state) if key.endswith("relative_position_bias_table")]
        if not all(np.array_equal(table, tables[0]) for table in tables):
            raise ConvertError(
                "the file that this model was read from has one table of relative positions for all blocks, and the "
                "tables of the model differ: it was trained since, and has no form in that layout"
            )
        state[_SHARED] = tables[0]
    return state


def _rewritten(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with two things in the names of others: DINOv3's masked bias of k, BEiT's shared position biases."""
    result = dict(state)
    for name in state:
        if name.endswith(_MASKED) and name.removesuffix("_mask") in state:
            q, _, v = np.split(np.asarray(result.pop(name.removesuffix("_mask"))), 3)
            mask_q, mask_k, mask_v = np.split(np.nan_to_num(np.asarray(state[name], np.float32)), 3)
            if np.any(mask_k) or not (np.all(mask_q == 1) and np.all(mask_v == 1)):
                raise ConvertError(f"{name} is not the published mask (1 for q and v, 0 for k)")
            stem = name.removesuffix(_MASKED)
            result |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
    if _SHARED in result:
        table = result.pop(_SHARED)
        for i in range(_depth(state)):
            result[f"blocks.{i}.attn.relative_position_bias_table"] = table
    return result


def _mask_again(state: dict[str, np.ndarray]) -> None:
    for name in [name for name in state if name.endswith("attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        q, v = state.pop(name), state.pop(f"{stem}v_bias")
        state[f"{stem}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
        state[f"{stem}{_MASKED}"] = np.concatenate([np.ones_like(q), np.zeros_like(q), np.ones_like(v)])


def _depth(state: Mapping[str, Any]) -> int:
    pattern = r"(?:blocks|layers?)\.(\d{1,3})\."
    return 1 + max((int(n) for key in state for n in re.findall(pattern, key)), default=0)


def _read(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[list[str]], list[str]]:
    """(our parameters by path, the names of the entries that were used, names that were not read)."""
    anchor = anchor_of([key for key in state if isinstance(key, str)])
    stems = [stem for stem in ANCHORS.get(anchor or "", ()) if any(key.startswith(f"{stem}.0.") for key in state)]
    flat: dict[str, np.ndarray] = {}
    used, unread = [], set(state)
    for found in (*outer_entries(), *(e for stem in stems for e in block_entries(stem))):
        for i in range(_depth(state) if "{i}" in found.torch[0] else 1):
            names = [name.format(i=i) for name in found.torch]
            if unread.issuperset(names) and fits(found, state, i):
                flat |= zip((path.format(i=i) for path in found.ours), to_ours(found, [state[n] for n in names]))
                unread -= set(names)
                if list(found.torch) not in used:
                    used.append(list(found.torch))
    return flat, used, sorted(unread, key=str)


def _split_leading(flat: dict[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """RADIO's CLS tokens and registers, which lie in one tensor."""
    if (leading := flat.pop("encoder/leading", None)) is None:
        return
    count = config.get("num_cls_tokens")
    if count is None:
        raise ConvertError(
            f"the file has {leading.shape[1]} tokens before the patches, and does not say how many of them are CLS "
            "tokens: put its config.json beside it, or name it by --config"
        )
    flat["encoder/cls_token"] = leading[:, : int(count)]
    if leading.shape[1] > int(count):
        flat["encoder/registers"] = leading[:, int(count) :]


def _classifier(head: Head, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier's record; a norm behind the pooling has the eps of the encoder's."""
    record: dict[str, Any] = {"classes": head.classes, "pool": head.pool}
    eps = encoder.get("switches", {}).get("eps")
    return record | ({"norm_eps": eps} if head.pool == "mean" and eps else {})


def _check_shapes(name: str, model: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Compares names and shapes with those of the network that the architecture describes."""
    import jax  # here because nothing else in this package needs it
    import jax.numpy as jnp

    from tinymim_jax.models.heads import Classifier
    from tinymim_jax.models.vit import ViT

    encoder = ViT.from_record(dict(model["encoder"]))
    whole = Classifier(encoder, **model["classifier"]) if "classifier" in model else encoder
    image = jnp.zeros((1, *model["encoder"]["image_size"], 3))
    expected: Any = jax.eval_shape(whole.init, jax.random.key(0), image)["params"]
    expected = expected if "classifier" in model else {"encoder": expected}
    shapes = {path: leaf.shape for path, leaf in _flatten(expected)}
    got = {path: leaf.shape for path, leaf in _flatten(params)}
    wrong = [path for path in sorted(shapes | got) if got.get(path) != shapes.get(path)]
    if wrong:
        lines = "\n  ".join(f"{p}: got {got.get(p)}, expected {shapes.get(p)}" for p in wrong[:_MAX_LISTED])
        raise ConvertError(f"the file does not hold a {name!r} model; of our parameters these differ:\n  {lines}")


def _groups(names: Sequence[str]) -> list[str]:
    """'head (2 tensors)' for each first part of these names."""
    firsts: dict[str, int] = {}
    for name in names:
        whole = _BUFFERS.search(name)
        first = whole[0] if whole else name.partition(".")[0]
        firsts[first] = firsts.get(first, 0) + 1
    return [f"{printable(first)} ({count} tensor{'s' * (count > 1)})" for first, count in firsts.items()]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return leaves
