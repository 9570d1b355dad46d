"""What a run shows of its model at each evaluation: what the heads do, and what it writes.

It stands above the other modules of training, because it looks at models and generates text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from attention_jax.generation import check, compile_ahead, generate
from attention_jax.training.build import arguments, jit_once, make_functions, refusals
from attention_jax.training.launch import Bound
from attention_jax.training.model import row_mask
from attention_jax.types import Array, PyTree

# A key of its own: `fold_in(key(seed), stream)`, as those of `build`.
_STREAM = 4
TEMPERATURE = 0.8


def make_watch(config: ConfigDict) -> Callable[[PyTree], dict[str, Array]]:
    """The function `params -> metrics` of `config.eval.heads`: what each head does on the first
    held-out batch.

    Their names are as `entropy/blocks_0/1`, for head 1 of the first block.
    """
    from attention_jax.analysis.statistics import head_statistics, summarize

    def watch(params: PyTree, given: PyTree) -> dict[str, Array]:
        functions = make_functions(config, given)
        batch = functions.held_out_batch()
        mask = row_mask(functions.task)
        options = {} if mask is None else {"mask": mask}
        found = head_statistics(functions.model, params, batch.inputs, **options)
        text = functions.task.text
        # A line is padded where it asks for no token.
        queries = batch.weights > 0 if text is not None and text.lines else None
        return {
            f"{name}/{path.removesuffix('/attention')}/{head}": value
            for path, summary in summarize(found, queries).items()
            for name, values in summary.items()
            for head, value in enumerate(values)
        }

    # It is called a few times.
    return Bound(jit_once(watch, level=0), arguments(config))


class Sampler(NamedTuple):
    """Writes text while a model trains.

    Attributes:
        sample: `(params, step) -> text`.
        compile_ahead: From the shapes of the parameters to the programs of `sample`, see
            `generation.compile_ahead`.
        check: From the same to an error, if the model cannot write.
    """

    sample: Callable[[PyTree, int], str]
    compile_ahead: Callable[[PyTree], list[Any]]
    check: Callable[[PyTree], None]


def make_sampler(config: ConfigDict) -> Sampler:
    """What writes the text of `config.eval.sample`.

    It begins after a newline, or after the first token of a vocabulary that has none. Of lines it
    writes as many as the tokens hold. The text depends on the seed and the step.
    """
    functions = make_functions(config)
    text, T = functions.task.text, config.task.seq_length
    rows, number = 1, config.eval.sample
    if text.lines:
        rows, number = max(1, number // T), T
    start = np.full((rows, 1), first_token(text), np.int32)
    options = {"temperature": TEMPERATURE, "context": max(2, T)}

    @jax.jit
    def key(seed: Array, step: Array) -> Array:
        rng = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STREAM)
        return jax.random.fold_in(rng, step)

    seed = np.int32(config.seed)

    def sample(params: PyTree, step: int) -> str:
        rng = key(seed, np.int32(step))
        try:
            found = generate(functions.model, params, start, number, rng=rng, **options)
        except FloatingPointError:  # The held-out loss is NaN too: the loop says so, and the step.
            return ""
        written = [text.vocabulary.decode(row) for row in np.asarray(found).tolist()]
        if text.lines:
            written = [line.partition("\n")[0] for line in written]
        return "\n".join(written)

    def on_shapes(of: Callable) -> Callable:
        def run(params: PyTree):
            more = {"rng": key(seed, np.int32(0)), "chunk": max(1, number), **options}
            return of(functions.model, params, start, number, **more)

        return run

    return Sampler(sample, on_shapes(compile_ahead), on_shapes(check))


class Look(NamedTuple):
    """What an evaluation does beside the held-out metrics; None where the config asks for none.

    Attributes:
        watch: That of `make_watch`.
        sampler: That of `make_sampler`.
    """

    watch: Callable[[PyTree], dict[str, Array]] | None
    sampler: Sampler | None


def make_look(config: ConfigDict, params: PyTree) -> Look:
    """What the config asks for.

    Args:
        config: Checked.
        params: The shapes of the parameters.

    Raises:
        ConfigError: The model has no such heads, or cannot write.
    """
    look = Look(
        make_watch(config) if config.eval.heads else None,
        make_sampler(config) if config.eval.sample else None,
    )
    # Trace them here, to raise their errors; a call does not trace them again.
    if look.watch is not None:
        with refusals(f"config.eval.heads={config.eval.heads}: "):
            look.watch.eval_shape(params)
    if look.sampler is not None:
        with refusals(f"config.eval.sample={config.eval.sample} (0: none): "):
            look.sampler.check(params)
    return look


def first_token(text) -> int:
    """The token that a text without a prompt begins after."""
    try:
        found = text.vocabulary.encode("\n")
    except ValueError:
        return 0
    return int(found[-1]) if len(found) else 0
