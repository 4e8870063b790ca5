"""Converts a Hugging Face folder (Llama or Mistral) into a checkpoint that danube_jax trains from.

Example:
  python tools/convert_from_hf.py --model=SmolLM2-135M-Instruct --output=runs/smollm2
  python tools/convert_from_hf.py --model=my-peft-adapter --base=runs/smollm2 --output=runs/adapter

The folder holds checkpoint 0 in the dtype of the weights, with tokenizer and chat template. Exit
status 2: the model is not supported or a file is missing or damaged; nothing is written then.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from danube_jax import command_line
from danube_jax.console import info

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face model folder, or a PEFT adapter's.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to make.")
_BASE = flags.DEFINE_string(
    "base", None, "The model that an adapter belongs to; default: what the adapter says."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what the output folder holds.")


def main(argv: Sequence[str]) -> int:
    """Converts, and says what was written; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("model", "output"))
    from danube_jax.interop.import_hf import import_model
    from danube_jax.interop.model_source import ADAPTER_CONFIG
    from danube_jax.interop.peft import import_adapter

    model, output = Path(_MODEL.value), Path(_OUTPUT.value)
    if (model / ADAPTER_CONFIG).is_file():
        lora = import_adapter(model, output, base=_BASE.value, overwrite=_OVERWRITE.value)
        info(f"{output}: LoRA of rank {lora.rank} on {', '.join(lora.targets)}")
        return 0
    imported = import_model(model, output, overwrite=_OVERWRITE.value)
    info(
        f"{output}: {imported.parameters:,} parameters in {', '.join(imported.dtypes)} "
        f"({imported.nbytes / 1e9:.2f} GB)"
    )
    if imported.tokenizer is not None:
        template = "with" if imported.tokenizer.chat_template else "without"
        info(f"tokenizer of {imported.tokenizer.vocab_size:,} ids, {template} a chat template")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)
