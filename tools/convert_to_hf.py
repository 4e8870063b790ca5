"""Exports a checkpoint as a Hugging Face folder that loads as it is, and checks that it does.

Example:
  python tools/convert_to_hf.py --model=runs/demo --output=exports/demo
  python tools/convert_to_hf.py --model=runs/demo/checkpoints/200 --output=exports/demo200 \\
      --dtype=float32 --chat_template=danube2
  python tools/convert_to_hf.py --model=runs/my_lora --output=exports/my_adapter --lora=adapter

What is written is loaded with transformers and compared with the checkpoint. Exit status 1: the two
do not agree; 2: a mistake in the command, the checkpoint or the disk. Nothing is left then.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from danube_jax import command_line
from danube_jax.console import info

_MODEL = flags.DEFINE_string("model", None, "A run's folder, or one of its checkpoints.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to make.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run; default: the newest.")
_DTYPE = flags.DEFINE_string(
    "dtype", "bfloat16", "bfloat16, float16, float32, or stored (the checkpoint's own)."
)
_SHARD_SIZE = flags.DEFINE_string("shard_size", "5GB", "Largest size of a weight file.")
_LORA = flags.DEFINE_string("lora", "merge", "A LoRA checkpoint is merged, or made an adapter.")
_BASE_NAME = flags.DEFINE_string(
    "base_name", "", "What an adapter calls its base; default: the base's folder."
)
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    "",
    "danube, danube2, danube3, a Jinja file, or none; default: what the checkpoint has.",
)
_LICENSE = flags.DEFINE_string(
    "license",
    "",
    "For the model card; default: apache-2.0, or other for what descends from an imported model.",
)
_VERIFY = flags.DEFINE_bool("verify", True, "Load what was written and compare (needs torch).")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what the output folder holds.")


def main(argv: Sequence[str]) -> int:
    """Exports, and says how it compares; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("model", "output"))
    from danube_jax.interop.export_hf import ExportOptions, export_model, parse_size
    from danube_jax.interop.model_source import open_model
    from danube_jax.interop.verify import describe

    options = ExportOptions(
        dtype=_DTYPE.value,
        shard_bytes=parse_size(_SHARD_SIZE.value),
        chat_template=_CHAT_TEMPLATE.value,
        license=_LICENSE.value,
        lora=_LORA.value,
        base_name=_BASE_NAME.value,
        verify=_VERIFY.value,
        overwrite=_OVERWRITE.value,
    )
    source = open_model(Path(_MODEL.value), _STEP.value)
    exported = export_model(source, Path(_OUTPUT.value), options)
    step = "" if exported.step is None else f" of step {exported.step}"
    info(f"{exported.path}: {', '.join(exported.files)}{step}")
    if exported.comparison is not None:
        info(describe(exported.comparison, options.dtype))
    else:
        info("not checked (--noverify)")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)
