"""The mask transformer against a plain reading of Segmenter's decoder in numpy, with eps 1e-6 in all norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.models.pixel_heads import MaskHead, mask_heads

ROWS, COLUMNS, WIDTH, CHANNELS, CLASSES = 3, 4, 5, 128, 6


def norm(x, params, eps=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x), approximate=False))


def block(x, params, heads):
    q, k, v = np.split(linear(norm(x, params["norm1"]), params["attn"]["qkv"]), 3, axis=-1)
    split = lambda y: y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)  # noqa: E731
    attended = softmax(split(q) @ split(k).swapaxes(2, 3) / np.sqrt(x.shape[-1] / heads)) @ split(v)
    x = x + linear(attended.swapaxes(1, 2).reshape(x.shape), params["attn"]["proj"])
    return x + linear(gelu(linear(norm(x, params["norm2"]), params["mlp"]["fc1"])), params["mlp"]["fc2"])


def by_numpy(params, maps):
    """MaskTransformer.forward of Segmenter without dropout: masks [batch, rows, columns, classes]."""
    x = linear(np.concatenate(maps, -1).reshape(len(maps[0]), ROWS * COLUMNS, -1), params["project"])
    x = np.concatenate([x, np.repeat(params["class_tokens"], len(x), 0)], 1)
    for i in range(2):
        x = block(x, params[f"blocks_{i}"], 2)
    x = norm(x, params["norm"])
    patches, own = linear(x[:, :-CLASSES], params["patches"]), linear(x[:, -CLASSES:], params["queries"])
    patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    masks = norm(patches @ own.swapaxes(1, 2), params["mask_norm"])
    return masks.reshape(len(x), ROWS, COLUMNS, CLASSES)


def test_logits_are_those_of_segmenter(close):
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(2, ROWS, COLUMNS, WIDTH)), jnp.float32) for _ in range(2)]
    head = MaskHead(CLASSES, CHANNELS, dropout=0.5)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), maps, train=False))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes["params"])
    assert set(shapes) == {"params"}  # nothing that runs along with the training
    got = head.apply({"params": params}, maps, train=False)
    close(got, by_numpy(jax.tree.map(np.float64, params), maps), 1e-5)
    np.testing.assert_array_equal(head.apply({"params": params}, maps, train=True), got)
    dropped = head.apply({"params": params}, maps, train=True, drop_key=jax.random.key(1))
    assert np.abs(dropped - got).max() > 0.1


def test_one_class_token_for_each_class_is_equivariant():
    """Classes in another order give the logits in that order."""
    head, maps = MaskHead(CLASSES, 16), [jnp.ones((1, ROWS, COLUMNS, WIDTH)) * jnp.arange(COLUMNS)[:, None]]
    params = head.init(jax.random.key(0), maps, train=False)["params"]
    order = np.array([2, 0, 1, 5, 4, 3])
    other = params | {"class_tokens": params["class_tokens"][:, order]}
    got, want = (np.asarray(head.apply({"params": each}, maps, train=False)) for each in (other, params))
    np.testing.assert_allclose(got, want[..., order], atol=1e-4)


def test_numbers_of_heads():
    assert [mask_heads(width) for width in (16, 64, 192, 768)] == [1, 1, 3, 12]
    with pytest.raises(ValueError, match="choose a multiple of 64, such as 128"):
        mask_heads(129)
