"""Linear probes: batch norm against torch's formula, the frozen encoder, and uses of a probe's run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import probe_config, run_steps, same_bits

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.config import load_config
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.predictor import load as load_model
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.batch_norm import batch_moments, batch_norm, update_running_stats
from tinymim_jax.sharding import batch_sharding, make_mesh
from tinymim_jax.state import init_state, trained_paths
from tinymim_jax.tasks.pretrained import Loaded, load
from tinymim_jax.tasks.probe.task import probed_network
from tinymim_jax.train import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted encoder with random weights and a final norm."""
    folder = tmp_path_factory.mktemp("encoder") / "vit"
    vit = ViT(embed_dim=16, depth=2, heads=4, patch_size=8, image_size=(16, 16))
    params = jax.jit(vit.init)(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))["params"]
    params["norm"] = {"scale": jnp.linspace(0.5, 2.0, 16), "bias": jnp.linspace(-1.0, 1.0, 16)}
    save_params(folder, {"encoder": params}, {"encoder": vit.record()})
    return folder


@pytest.mark.parametrize("devices", [1, 8])
def test_running_statistics_are_torchs(devices):
    """Batches are normalised by their biased variance; running statistics use the unbiased one, momentum 0.1."""
    rng = np.random.default_rng(0)
    running = {"mean": jnp.zeros(5), "variance": jnp.ones(5)}
    want_mean, want_variance = np.zeros(5), np.ones(5)
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:devices]))

    @jax.jit
    def step(running, x):
        moments = batch_moments(x)
        return batch_norm(x, *moments), update_running_stats(running, *moments, count=len(x))

    for _ in range(3):
        x = rng.normal(3.0, 2.0, size=(16, 5)).astype(np.float32)
        normed, running = step(running, jax.device_put(x, sharding))
        np.testing.assert_allclose(normed, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), atol=1e-5)
        want_mean = 0.9 * want_mean + 0.1 * x.mean(0)
        want_variance = 0.9 * want_variance + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(running["mean"], want_mean, rtol=1e-5)
    np.testing.assert_allclose(running["variance"], want_variance, rtol=1e-5)


def features_of(config, checkpoint, data_dir, steps):
    """The first training batches' features, by the encoder itself."""
    loaded = load(str(checkpoint))
    encoder = ViT.from_record(loaded.model["encoder"])
    apply, found = jax.jit(encoder.apply), []
    with training_batches(build_experiment(config, data_dir=data_dir), start_step=0, workers=0) as batches:
        for _ in range(steps):
            pixels = jnp.asarray(next(batches)["image"]) / 127.5 - 1
            found.append(np.asarray(apply({"params": loaded.params["encoder"]}, pixels))[:, 0])
    return found


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (8, 1), (8, 2)])
def test_statistics_of_the_global_batch_and_of_its_parts(checkpoint, data_dir, devices, accumulate):
    config = probe_config(f"init={checkpoint}", f"train.accumulate={accumulate}")
    mesh = make_mesh(devices=jax.devices()[:devices])
    state, losses, before, after = run_steps(config, data_dir, mesh, 2)
    assert np.isfinite(losses).all()
    assert same_bits(before, after)  # the encoder
    assert set(state.params) == {"head", "batch_norm"}
    mean, variance = np.zeros(16), np.ones(16)
    for batch in features_of(config, checkpoint, data_dir, 2):
        for part in range(accumulate):
            rows = batch[part::accumulate]  # the micro-batches of state._accumulated
            mean = 0.9 * mean + 0.1 * rows.mean(0)
            variance = 0.9 * variance + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(state.params["batch_norm"]["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.params["batch_norm"]["variance"], variance, rtol=1e-4)


def test_the_head_alone_is_trained(checkpoint, data_dir):
    experiment = build_experiment(probe_config(f"init={checkpoint}"), data_dir=data_dir)
    paths = trained_paths(experiment.task, experiment.task.load_frozen(), batch_shapes(experiment))
    assert paths == {("head", "kernel"), ("head", "bias")}
    head = experiment.task.init(jax.random.key(0))["head"]
    assert np.std(head["kernel"]) == pytest.approx(0.01, rel=0.3)  # of 160 draws
    assert not np.any(head["bias"])


def test_a_step_that_is_not_finite_moves_no_statistics(checkpoint, data_dir):
    config = probe_config(f"init={checkpoint}", "data.mean=(0.5,0.5,1e999)")
    state, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 1)
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.params["batch_norm"]["mean"], 0)
    np.testing.assert_array_equal(state.params["batch_norm"]["variance"], 1)


@pytest.fixture(scope="module")
def probe_run(checkpoint, tmp_path_factory, data_dir):
    return run_probe(tmp_path_factory.mktemp("probe"), checkpoint, data_dir, "cls")


def run_probe(workdir, checkpoint, data_dir, pool):
    config = probe_config(f"init={checkpoint}", f"probe.pool={pool}", "optim.name=sgd", "train.duration=12 steps")
    return config, workdir, train(config, workdir, data_dir=data_dir)


def test_statistics_come_back_from_a_checkpoint(probe_run, data_dir):
    config, workdir, _ = probe_run
    experiment = build_experiment(config, data_dir=data_dir)
    paths = trained_paths(experiment.task, experiment.task.load_frozen(), batch_shapes(experiment))
    optimizer, mesh = build_optimizer(experiment, paths), make_mesh()
    abstract, _ = init_state(experiment.task, optimizer, paths, mesh, jax.random.key(0), ema=0.0)
    with Checkpoints(workdir / "checkpoints", keep=3, every_seconds=0.0) as checkpoints:
        restored = checkpoints.restore(abstract)
    want, *_ = run_steps(config, data_dir, mesh, 12)
    assert same_bits(jax.device_get(restored), jax.device_get(want))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_probes_run_is_a_classifier(probe_run, checkpoint, data_dir, tmp_path, pool):
    """Its evaluation agrees with that of training; head and batch norm are one Linear on the features."""
    config, workdir, result = probe_run if pool == "cls" else run_probe(tmp_path, checkpoint, data_dir, pool)
    assert result["examples"] == 13
    again = evaluate_checkpoint(config, workdir, data_dir=data_dir)
    assert again["top1"] == result["top1"]
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-4)
    model, params = load_params(workdir)
    assert model["classifier"] == {"classes": 10, "pool": config.probe.pool}
    assert same_bits(params["encoder"]["blocks_1"], load_params(checkpoint)[1]["encoder"]["blocks_1"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    network = Classifier(ViT.from_record(model["encoder"]), **model["classifier"])
    logits = network.apply({"params": params}, jnp.asarray(pixels) / 127.5 - 1)
    np.testing.assert_allclose(load_model(workdir).logits(pixels), logits, atol=1e-4)


def test_an_encoder_that_changed_is_not_taken_for_the_one_that_was_probed(probe_run, checkpoint, tmp_path):
    _, workdir, _ = probe_run
    model, params = load_params(checkpoint)
    params["encoder"]["norm"]["scale"] = params["encoder"]["norm"]["scale"] + 1e-6
    save_params(tmp_path / "mae", params, model)
    copy = tmp_path / "probe"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(workdir / "checkpoints")
    record = (workdir / "model.json").read_text()
    before = load(str(workdir)).model["probe"]["checkpoint"]
    (copy / "model.json").write_text(record.replace(before, str(tmp_path / "mae")))
    with pytest.raises(CheckpointError, match="which has changed since"):
        load_params(copy)
    (copy / "model.json").write_text(record.replace(before, str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match=r"linear probe of .*gone, which cannot be read: .*does not exist"):
        load_params(copy)


def test_mistakes_of_a_probe(checkpoint, data_dir):
    with pytest.raises(ValueError, match="init is empty: a linear probe evaluates a pre-trained encoder"):
        build_experiment(probe_config(), data_dir=data_dir)
    with pytest.raises(ValueError, match=r"pool='max' is unknown.*'cls'"):
        build_experiment(probe_config(f"init={checkpoint}", "probe.pool=max"), data_dir=data_dir)
    with pytest.raises(ValueError, match=r"configs/linprobe.py:adam is unknown. Choices: lars, sgd"):
        load_config("configs/linprobe.py:adam")


def test_a_head_that_does_not_fit_starts_afresh_and_is_named(probe_run, checkpoint, data_dir, caplog):
    _, workdir, _ = probe_run

    def head_of(*words):
        caplog.clear()
        task = build_experiment(probe_config(*words), data_dir=data_dir).task
        fresh = jax.device_get(task.init(jax.random.key(0)))
        with caplog.at_level("INFO"):
            return task.start(fresh)["head"]["kernel"], fresh["head"]["kernel"]

    started, fresh = head_of(f"init={workdir}")
    assert not np.array_equal(started, fresh)
    assert "init:" not in caplog.text
    np.testing.assert_array_equal(*head_of(f"init={workdir}", "probe.pool=mean"))
    assert "WARNING" in caplog.text
    assert "'pool': 'cls'}, the config asks for {'classes': 10, 'pool': 'mean'}: it starts from" in caplog.text


def test_an_encoder_with_a_dist_token_is_refused():
    vit = ViT(embed_dim=16, depth=1, heads=4, patch_size=8, image_size=(16, 16), dist_token=True)
    loaded = Loaded("runs/star", {"encoder": vit.record()}, {})
    with pytest.raises(ValueError, match="runs/star has a DIST token"):
        probed_network(loaded, probe_config().model, "cls", 10)
