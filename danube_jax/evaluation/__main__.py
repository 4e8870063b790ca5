"""lm-evaluation-harness's own command line, with our model registered as `danube_jax`.

Example:
  python -m danube_jax.evaluation run --model danube_jax --model_args pretrained=DIR --tasks piqa

`python -m danube_jax.evaluate` has presets, published scores, local data and its own results.
"""

import os

from danube_jax.errors import exit_on_user_error


def main() -> None:
    """Registers the model, then lm-eval reads the command line."""
    with exit_on_user_error():
        from danube_jax.evaluation.local_data import tasks_folder

        tasks_folder()  # refuses a machine without lm-eval
        from lm_eval.__main__ import cli_evaluate

        import danube_jax.evaluation.harness  # noqa: F401, registers the model

        cli_evaluate()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
