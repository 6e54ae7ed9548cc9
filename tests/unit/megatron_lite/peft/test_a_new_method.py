"""One file and one line make a PEFT method (``tests/kit/ia3.py``): config, training, checkpoints, commands know it."""

import json
import subprocess
import sys

import pytest

from megatron_lite.peft import METHODS
from tests.kit.tiny import tiny_config, tiny_data

PROGRAM = """
import json, sys
from pathlib import Path
import tests.kit.ia3
from megatron_lite.config import load_config, parse_peft
from megatron_lite.errors import MegatronLiteError

found, config = {"torch": "torch" in sys.modules}, Path(sys.argv[1])
base, tuned, out = (config.parent / name for name in ("run", "tuned", "out"))

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except MegatronLiteError as error:
        return str(error)

found["unknown key"] = error(parse_peft, {"method": "ia3", "onyl": "mlp"}, "here")
found["unknown method"] = error(parse_peft, {"method": "ia33"}, "here")

from megatron_lite import checkpoint, convert
from megatron_lite.distributed.mesh import Axis, solo_mesh
from megatron_lite.inference.generate import open_models
from tests.kit.alone import run_alone
run_alone(config)
flags = ("run.name=tuned", f"init.from={base}", "peft.method=ia3", "peft.only=mlp")
run, log = run_alone(config, *flags, "train.steps=2")
found["log"] = log
found["tuned"] = sorted(n for n in run.trainer.engine.pieces() if n.startswith("model."))
found["resumed"] = run_alone(config, *flags, "train.steps=3")[1]
found["otherwise"] = error(run_alone, config, *flags[:-1], "train.steps=4")
with open_models(tuned, solo_mesh(), None, {}, None) as (models, _, default):
    weights = dict(models[default].named_parameters())
    found["moved"] = [(weights[f"blocks.{i}.mlp_adapter.weight"] != 1).any().item() for i in (0, 1)]
found["export"] = error(convert.export_peft, tuned, out, None, trust=False)
found["merge"] = error(convert.merge_adapter, tuned, out, None, "ours", "stored", unmerge=False, trust=False)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process says that has the method."""
    folder = tmp_path_factory.mktemp("ia3")
    config = tiny_config(folder, tiny_data(folder), train__steps=1, optim__warmup_steps=0, optim__schedule="constant")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_config_knows_its_keys_and_still_needs_no_torch(found):
    assert not found["torch"]
    told = "peft.onyl: unknown key (did you mean 'only'?); known: base_dtype, method, only"
    assert found["unknown key"] == f"here: {told}"
    told = f"peft.method: expected {', '.join(METHODS)}, ia3, not 'ia33' (did you mean 'ia3'?)"
    assert found["unknown method"] == f"here: {told}"


def test_it_alone_is_trained_saved_resumed_and_loaded(found):
    assert "ia3 on blocks.0-1 mlp" in found["log"]
    assert found["tuned"] == [f"model.blocks.{i}.mlp_adapter.weight" for i in (0, 1)]
    assert "step_00000002: step 2" in found["resumed"]
    assert "peft.only mlp there, None here" in found["otherwise"]
    assert found["moved"] == [True, True]


def test_what_it_has_no_form_for_is_refused_by_name(found):
    assert found["export"].endswith("peft.method=ia3 cannot be exported, only lora, prefix")
    assert found["merge"].endswith("peft.method=ia3 changes no weights: nothing to merge")
