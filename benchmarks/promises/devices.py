"""One seed, one run: bit by bit in every process, up to rounding on any number of devices."""

from collections.abc import Iterator
from typing import Any

from promises.trainer import TINY, Broken, Lab, Row, Trainer, outcome

DISTANCE = 1e-5
# Plain gradient descent: adam makes steps of full size from the rounding of a gradient of zero.
SGD = (*TINY, "--config.optimizer.name=sgd", "--learning_rate=0.1", "--config.model.dropout_rate=0")


def devices(lab: Lab, count: int = 3) -> Iterator[Row]:
    """Runs the same command in several processes, then on 1, 2, 4 and 8 simulated devices."""
    trainer = Trainer(lab, *TINY)

    def again() -> None:
        workdir = lab.new("again")
        trainer.finish(workdir, cache=lab.new("cache"))
        if outcome(workdir) != trainer.whole.outcome:
            raise Broken(f"{workdir} is another run")

    kept = sum(lab.kept("same seed", again) for _ in range(count - 1))
    yield Row("the same seed in other processes", count, kept + 1)

    first, kept, farthest = _params(lab, "single", 1), 0, 0.0
    cases = [(launcher, number) for launcher in ("pmap", "sharded") for number in (1, 2, 4, 8)]
    for launcher, number in cases:
        far = _distance(first, _params(lab, launcher, number))
        farthest = max(far, farthest)
        kept += lab.kept(f"{launcher} on {number}", _near, far)
    yield Row("pmap and sharded on 1, 2, 4, 8 devices", len(cases), kept, f"{farthest:.1e} apart")


def _near(far: float) -> None:
    if far > DISTANCE:
        raise Broken(f"parameters are {far:.1e} apart")


def _params(lab: Lab, launcher: str, number: int) -> Any:
    from attention_jax.training.build import build
    from attention_jax.training.checkpoint import restore_params
    from attention_jax.training.command import parse

    workdir = lab.new("devices")
    flags = [*SGD, f"--launcher={launcher}"]
    Trainer(lab, *flags, devices=number).finish(workdir)
    config = parse(["train.py", *SGD]).config
    like = build(config).init.eval_shape().params
    return restore_params(workdir, like=like)


def _distance(first: Any, second: Any) -> float:
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)
