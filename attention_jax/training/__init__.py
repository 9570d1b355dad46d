"""Training: pure steps, the launchers that run them on devices, and checkpoints.

Import the module you need; `attention_jax.training` itself imports no modules, so that reading
flags does not wait for jax.
"""
