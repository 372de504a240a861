"""What is exported: a trained network, the function it computes, and how images are prepared for it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.models.convolutions import STATISTICS
from tinymim_jax.models.heads import Classifier, check_pool, pool_tokens
from tinymim_jax.models.segmentation import SegmentationNetwork, variables
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.posembed import sincos_table
from tinymim_jax.ops.segmentation import labels_dtype, resize_bilinear

# What an exported program returns: class scores, features of an image, all tokens of the encoder, or the class of every
# pixel.
OUTPUTS = ("logits", "mean", "cls", "tokens", "class_map")
# Parts of a record that have parameters and are used in training only.
_TRAINING_ONLY = ("decoder", "adapter", "statistics", "mask_token")


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network and which of its outputs is exported.

    record: the architecture, as in model.json.
    params: nested dicts of float32 numpy arrays: `encoder`, and the parts of a classifier, or of a network that labels
      pixels, where there is one.
    preprocessing: how an image becomes the network's input, and `class_names`; see experiment.preprocessing.
    output: 'logits', which of a network that labels pixels are [batch, rows, columns, classes] on the grid of its head;
      'class_map', the most probable class of every pixel, [batch, height, width]; 'mean' or 'cls' features, as
      `tinymim_jax.load(...).embed(pool=...)` gives them; or 'tokens', [batch, prefix + patches, embed_dim] with the
      final norm where the encoder has one.
    """

    record: Mapping[str, Any]
    params: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    output: str = "logits"

    def __post_init__(self):
        if self.output not in OUTPUTS:
            raise ConvertError(f"output={self.output!r} is unknown. Choices: {', '.join(map(repr, OUTPUTS))}")
        if self.output == "class_map" and "segmenter" not in self.record:
            raise ConvertError("the checkpoint is no segmentation network, so it has no class map to export")
        has_logits = "segmenter" in self.record or ("head" in self.params and self.record.get("classifier"))
        if self.output == "logits" and not has_logits:
            raise ConvertError(
                "the checkpoint has no classifier, so there are no logits to export: choose --features mean, cls or "
                "tokens to export the encoder, or fine-tune it first"
            )
        check_pool(self.encoder, self.output)

    @property
    def encoder(self) -> ViT:
        return ViT.from_record(dict(self.record["encoder"]))

    @property
    def classifier(self) -> Classifier:
        return Classifier(self.encoder, **self.record["classifier"])

    @property
    def labels_pixels(self) -> bool:
        """Whether the output is about pixels: their logits or classes."""
        return "segmenter" in self.record and self.output in ("logits", "class_map")

    @property
    def segmenter(self) -> SegmentationNetwork:
        return SegmentationNetwork.from_record(self.encoder, self.record["segmenter"], auxiliary=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.record["encoder"]["image_size"]
        return height, width

    @property
    def class_names(self) -> list[str]:
        """What the outputs are called; empty if they have no names, or are features."""
        return list(self.preprocessing.get("class_names", [])) if self.output in ("logits", "class_map") else []

    @property
    def output_name(self) -> str:
        """What the output is called in files."""
        return self.output if self.output in ("logits", "class_map") else "features"

    def output_shape(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape, without the batch, and dtype of the output of `forward`."""
        pixels = jax.ShapeDtypeStruct((1, *self.image_size, 3), jnp.float32)
        found = jax.eval_shape(self.forward(), self.used_params(), pixels)
        return found.shape[1:], np.dtype(found.dtype)

    @property
    def logits_grid(self) -> tuple[int, int]:
        """(rows, columns) of the logits of a network that labels pixels."""
        (rows, columns, _), _ = dataclasses.replace(self, output="logits").output_shape()
        return rows, columns

    @property
    def tokens(self) -> int:
        """Tokens of an image, those before the patches included."""
        encoder = self.encoder
        return encoder.prefix + encoder.grid[0] * encoder.grid[1]

    @property
    def positions(self) -> np.ndarray:
        """The position table, learned or fixed: float32 [1, tokens, embed_dim]."""
        encoder = self.encoder
        if encoder.pos_embed == "learned":
            return np.asarray(self.params["encoder"]["pos_embed"])
        return sincos_table(encoder.embed_dim, encoder.grid, encoder.prefix)

    def used_params(self) -> dict[str, Any]:
        """The parameters that the output depends on."""
        kept = {"encoder": self.params["encoder"]}
        if self.output in ("logits", "class_map"):
            kept = {name: tree for name, tree in self.params.items() if name not in _TRAINING_ONLY}
        return kept

    def function(self) -> Callable[[jax.Array], jax.Array]:
        """Normalised pixels float32 [batch, height, width, 3] to the output; the parameters are constants in it."""
        params, forward = self.used_params(), self.forward()
        return lambda pixels: forward(params, pixels)

    def forward(self) -> Callable[[Any, jax.Array], jax.Array]:
        """As `function`, of (`used_params()`, pixels): large networks compile faster if parameters are no constants."""
        if self.output == "class_map":
            dtype, scores = labels_dtype(self.segmenter.classes), self.scores()
            return lambda params, pixels: jnp.argmax(scores(params, pixels), axis=-1).astype(dtype)
        if self.labels_pixels:
            segmenter: Any = self.segmenter
            return lambda params, pixels: segmenter.apply(variables(jax.tree.map(jnp.asarray, params)), pixels)
        if self.output == "logits":
            classifier: Any = self.classifier
            return lambda params, pixels: classifier.apply({"params": params}, pixels)
        encoder: Any = self.encoder

        def features(params: Any, pixels: jax.Array) -> jax.Array:
            tokens = encoder.apply({"params": params["encoder"]}, pixels)
            tokens = tokens.astype(jnp.float32)
            return tokens if self.output == "tokens" else pool_tokens(tokens, self.output, encoder)

        return features

    def scores(self) -> Callable[[Any, jax.Array], jax.Array]:
        """As `forward`, but of a class map the logits of which it is made: [batch, height, width, classes]."""
        if self.output != "class_map":
            return self.forward()
        logits = dataclasses.replace(self, output="logits").forward()
        return lambda params, pixels: resize_bilinear(logits(params, pixels), self.image_size)

    def description(self) -> dict[str, str]:
        """What travels with an exported file, by key; every value is a text, JSON where it is structured."""
        # `origin` marks values of a converted file that were assumed; the export drops it.
        prepared = {key: value for key, value in self.preprocessing.items() if key not in ("class_names", "origin")}
        record = {
            key: self.record[key] for key in ("encoder", "classifier", "segmenter", "source") if key in self.record
        }
        return {
            "producer": "tinymim-jax",
            "output": self.output,
            "preprocessing": json.dumps(prepared),
            "class_names": json.dumps(self.class_names),
            "model": json.dumps(record),
        }


def without_training_parts(
    record: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A network that labels pixels without what its logits do not depend on: auxiliary head, blocks behind the taps."""
    depth = max(record["segmenter"]["taps"])
    encoder = dict(record["encoder"]) | {"depth": depth, "heads": list(record["encoder"]["heads"])[:depth]}
    segmenter = dict(record["segmenter"])
    if "auxiliary" in segmenter:
        segmenter["auxiliary"] = 0
    unused = {f"blocks_{i}" for i in range(depth, record["encoder"]["depth"])}
    kept = {name: tree for name, tree in params.items() if name != "auxiliary_head"}
    kept["encoder"] = {name: tree for name, tree in params["encoder"].items() if name not in unused}
    if STATISTICS in params:
        kept[STATISTICS] = {name: tree for name, tree in params[STATISTICS].items() if name != "auxiliary_head"}
    return dict(record) | {"encoder": encoder, "segmenter": segmenter}, kept


def check_params(record: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raises ConvertError if `params` are not those of the network that `record` describes."""
    encoder: Any = ViT.from_record(dict(record["encoder"]))
    pixels = jax.ShapeDtypeStruct((1, *encoder.image_size, 3), jnp.float32)
    network: Any = encoder
    if "segmenter" in record:
        network = SegmentationNetwork.from_record(encoder, record["segmenter"])
    elif "classifier" in record:
        network = Classifier(encoder, **record["classifier"])
    found = dict(jax.eval_shape(network.init, jax.random.key(0), pixels))
    expected = dict(found.pop("params")) | found
    expected = {"encoder": expected} if network is encoder else expected
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (expected, params)
    ]
    if shapes[0] != shapes[1]:
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ConvertError(f"its tensors are not those of the architecture in its metadata: {', '.join(differing[:8])}")


def size_of(params: Mapping[str, Any]) -> int:
    """Bytes of all arrays in nested dicts."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(dict(params)))


def refuse_two_pools(network: Network) -> None:
    """Raises ConvertError for logits of CLS and mean side by side, in formats that have one pooling or the other."""
    if network.output == "logits" and network.record.get("classifier", {}).get("pool") == "cls_mean":
        raise ConvertError(
            "its head reads CLS and the mean of the patches (pool cls_mean): export it --to stablehlo or litert"
        )
