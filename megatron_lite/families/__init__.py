"""What differs between model families, as tables. A new family is a file here and a line in ``FAMILIES``. No torch."""

from megatron_lite.families.gpt2 import GPT2
from megatron_lite.families.llama import LLAMA

FAMILIES = {"llama": LLAMA, "gpt2": GPT2}  # model.family → its table
