"""The config: one pydantic tree, read from YAML with ``--section.key=value`` overrides on top.

No torch here, so mistakes are reported in well under a second: all at once, each with its key and the nearest valid
one.
"""

from megatron_lite.config.launch import SlurmConfig
from megatron_lite.config.model import CHANGEABLE, ModelConfig, RopeScaling
from megatron_lite.config.peft import PeftConfig
from megatron_lite.config.settings import apply_overrides, load_config, model_section, to_yaml
from megatron_lite.config.training import (
    PRECISIONS,
    DataConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_lite.config.tree import Config
from megatron_lite.config.validation import parse_config, parse_model, parse_peft, parse_section
from megatron_lite.config.yaml_text import parse_yaml, read_yaml
from megatron_lite.peft.method import PACKED_BLOCK, PACKED_BYTES
