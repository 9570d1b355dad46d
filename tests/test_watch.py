"""What `config.eval.heads` logs is what the heads do."""

from functools import partial

import jax
import numpy as np
import pytest

from attention_jax.analysis import attention_maps, dead_heads, head_statistics, summarize
from attention_jax.training import build, experiment, watch
from attention_jax.training.config import ConfigError, default_config, trials


@pytest.fixture(scope="module")
def config():
    config = default_config("recall")
    config.task.seq_length, config.task.vocab_size = 16, 32
    config.model.features = 8
    config.train.epochs = config.train.steps_per_epoch = config.eval.num_batches = 1
    config.eval.heads = True
    return config


def test_rows_hold_the_statistics_of_the_maps_and_the_gradients(config):
    result = experiment.run(config)
    found = build.make_functions(config)
    batch = found.held_out_batch()
    maps = jax.jit(partial(attention_maps, found.model))(result.params, batch.inputs)
    for block in (0, 1):
        weights = np.asarray(maps[f"blocks_{block}/attention"], np.float64)  # [B, N, T, S]
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean((0, 2))
        for head in (0, 1):
            logged = result.history[-1][f"eval_entropy/blocks_{block}/{head}"]
            np.testing.assert_allclose(logged, entropy[head], rtol=1e-4)
            first = result.history[-1][f"eval_to_first/blocks_{block}/{head}"]
            np.testing.assert_allclose(first, weights[:, head, :, 0].mean(), rtol=1e-4)
    first = result.history[0]  # Of one step, so that it is no mean.
    norms = [first[f"grad_norm/{name}"] for name in result.params]
    np.testing.assert_allclose(np.linalg.norm(norms), first["grad_norm"], rtol=1e-5)
    assert all(f"grad_norm/{name}" in result.history[-1] for name in result.params)


def test_watching_changes_no_number_of_the_run(config):
    watched = experiment.run(config)
    config = config.copy_and_resolve_references()
    config.eval.heads = False
    alone = experiment.run(config)
    assert watched.metrics["fingerprint"] == alone.metrics["fingerprint"]
    assert not any("/" in name for name in alone.history[-1])


@pytest.mark.slow
def test_the_padding_of_lines_does_not_count(tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"{'abcd' * (1 + i % 3)}\n" for i in range(60)))
    config = default_config("text")
    config.task.update({"path": str(tmp_path / "names.txt"), "lines": True, "seq_length": 20})
    config.model.update({"features": 8, "num_heads": 2, "num_layers": 1})
    found = build.make_functions(config)
    batch, params = found.held_out_batch(), jax.jit(found.init)().params
    logged = watch.make_watch(config)(params)
    (maps,) = attention_maps(found.model, params, batch.inputs).values()
    counts = np.asarray(batch.weights) > 0
    assert not counts.all()
    for head in (0, 1):
        first = np.asarray(maps)[:, head, :, 0][counts].mean()
        np.testing.assert_allclose(logged[f"to_first/blocks_0/{head}"], first, rtol=1e-5)


def test_heads_are_not_watched_in_a_sweep(config):
    with pytest.raises(ConfigError, match=r"eval\.heads"):
        trials(config, {"seed": [0, 1]})


def test_a_head_that_ignores_its_input_is_told(config):
    found = build.make_functions(config)
    batch = found.held_out_batch()
    params = jax.jit(found.init)().params
    layer = params["blocks_0"]["attention"]
    query = jax.tree.map(lambda x: x.at[..., 0, :].set(0), layer["query"])  # All logits are 0.
    params = {
        **params,
        "blocks_0": {**params["blocks_0"], "attention": {**layer, "query": query}},
    }
    statistics = jax.jit(partial(head_statistics, found.model))(params, batch.inputs)
    lines = dead_heads(summarize(statistics))
    assert [line for line in lines if "uniform" in line] == [lines[0]]
    assert lines[0].startswith("blocks_0/attention head 0 is uniform")
