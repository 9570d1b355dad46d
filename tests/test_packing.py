"""Documents in one row: each has the numbers that it has alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

from attention_jax.tasks import TASKS, packed
from attention_jax.training import build
from attention_jax.training.build import make_functions
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError

LENGTHS = (4, 10, 6)


def packed_config(*flags, task="copy", seq_length=20, pack="4+10+6"):
    sizes = [f"--config.task.pack={pack}", f"--seq_length={seq_length}", "--batch_size=3"]
    model = ["--config.model.features=8", "--config.model.num_layers=1"]
    return parse(["train.py", f"--task={task}", *sizes, *model, *flags]).config


def documents(batch, lengths=LENGTHS):
    """The documents of packed copies: inputs, targets, places of the labels."""
    start = label = 0
    for length in lengths:
        own = np.s_[:, label : label + length // 2]
        yield (
            batch.inputs[:, start : start + length],
            batch.targets[own],
            batch.positions[own] - start,
        )
        start, label = start + length, label + length // 2


def test_a_packed_row_is_a_row_of_each_length():
    task = packed([TASKS["copy"](seq_length=n) for n in LENGTHS])
    batch = jax.jit(task.sample)(jax.random.key(1), jnp.arange(5))
    assert batch.inputs.shape == (5, 20)
    assert task.documents.tolist() == [0] * 4 + [1] * 10 + [2] * 6
    for (inputs, targets, places), length in zip(documents(batch), LENGTHS, strict=True):
        half = length // 2
        np.testing.assert_array_equal(inputs[:, :half], targets)
        assert not inputs[:, half:].any()
        np.testing.assert_array_equal(places, np.broadcast_to(np.arange(half, length), (5, half)))
    assert float(task.baseline[1](batch)) == pytest.approx(np.log(15))


def test_documents_of_a_row_are_strangers_and_rows_depend_on_their_number_alone():
    task = packed([TASKS["copy"](seq_length=8)] * 2)
    batch = jax.jit(task.sample)(jax.random.key(1), jnp.arange(6))
    assert (batch.targets[:, :4] != batch.targets[:, 4:]).any(axis=1).all()
    again = jax.jit(task.sample)(jax.random.key(1), jnp.array([4]))
    np.testing.assert_array_equal(again.inputs[0], batch.inputs[4])


@pytest.mark.parametrize(
    "positions", ["learned", *(pytest.param(x, marks=pytest.mark.slow) for x in ("rotary", "none"))]
)
def test_a_packed_document_gives_the_numbers_that_it_gives_alone(positions):
    functions = make_functions(packed_config(f"--config.model.positions={positions}"))

    @jax.jit
    def losses():
        """That of the packed rows, and that of their documents as rows."""
        params, batch = functions.init().params, functions.held_out_batch()
        alone = weight = 0.0
        for inputs, targets, places in documents(batch):
            logits = functions.model.apply({"params": params}, inputs, output_positions=places)
            chances = jax.nn.log_softmax(logits)
            alone -= jnp.take_along_axis(chances, targets[..., None], -1).sum()
            weight += targets.size
        return functions.loss(params, batch), alone / weight

    assert_close(*losses(), 1e-5)


@pytest.mark.slow
def test_packed_documents_train():
    functions = make_functions(packed_config("--config.train.steps_per_epoch=4"))
    state, metrics = jax.jit(lambda rows: functions.epoch(functions.init(), rows))(jnp.arange(3))
    assert int(state.step) == 4
    assert np.isfinite(metrics["loss"]).all()


def test_a_mask_of_a_task_stays_inside_its_document():
    task = packed([TASKS["compression"](seq_length=n) for n in (3, 5)])
    assert task.mask[:3, :3].any()
    assert not task.mask[:3, 3:].any()
    assert not task.mask[3:, :3].any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.task.pack=4+10"], "add up to seq_length=20.*'4.10'"),
        (["--config.task.pack=4+x+6"], "4.x.6"),
        (["--config.task.pack=5+9+6"], "seq_length of copy must be even: got 5"),
        (["--config.model.short_conv=2"], "short_conv=2"),
        (["--config.eval.slices=24"], "24.*add up to seq_length=24"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_refused_in_a_line(flags, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        build.build(packed_config(*flags))
    assert "\n" not in str(refusal.value)


def test_tasks_of_other_vocabularies_are_not_packed():
    tasks = [TASKS["copy"](vocab_size=n) for n in (5, 6)]
    with pytest.raises(ValueError, match=r"copy \(5\), copy \(6\)"):
        packed(tasks)
