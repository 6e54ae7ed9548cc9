"""What the CPU tests prove, on a GPU: the same numbers, the kernels it has of its own, and a run through NCCL."""

import json
import math

import pytest
import torch

from megatron_lite.config import Config
from megatron_lite.distributed.mesh import solo_mesh
from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.proof.record import compare, record
from tests.kit.jobs import PYTHON, run_job
from tests.kit.parity import STEPS, Layout, ruffle
from tests.kit.tiny import losses, tiny_config, tiny_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MODELS = {"llama": {"num_kv_heads": 2}, "gpt2": {"family": "gpt2"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny_data(tmp_path_factory.mktemp("cuda")))


def records(config: Config, device: str):
    return list(record(config, solo_mesh(device), STEPS, ruffle))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("offload", [False, True])
def test_float64_is_that_of_the_cpu(data, model, recompute, offload):
    parallel = {"recompute": recompute, "offload_activations": offload}
    config = Layout(accumulation=2, parallel=parallel).config(data, {"model": MODELS[model]})
    for step, (cpu, gpu) in enumerate(zip(records(config, "cpu"), records(config, "cuda"), strict=True), 1):
        for row in compare(cpu, gpu, step, 1e-10):
            assert row.first_beyond is None, row


def test_the_document_mask_and_dropout_run(data):
    changes = {"data": {"document_mask": True}, "model": {"dropout": 0.1, "attention_dropout": 0.1}}
    config = Layout(accumulation=2).config(data, {**changes, "train": {"precision": "bfloat16"}})
    found = [float(noted["loss/loss"]) for noted in records(config, "cuda")]
    assert found == [float(noted["loss/loss"]) for noted in records(config, "cuda")]
    assert all(map(math.isfinite, found))


def test_offloaded_activations_leave_the_device(data):
    """Of many blocks, only what one of them computes is there at a time."""
    peaks = {}
    for offload in (False, True):
        parallel = {"offload_activations": offload}
        config = Layout(parallel=parallel).config(data, {"model": {"num_layers": 24}})
        torch.cuda.reset_peak_memory_stats()
        list(record(config, solo_mesh("cuda"), 1, None))
        peaks[offload] = torch.cuda.max_memory_allocated()
    assert peaks[True] < 0.8 * peaks[False]


def test_the_same_tokens_as_on_the_cpu(data):
    config = Layout().config(data, {})
    produced = {}
    for device in ("cpu", "cuda"):
        trainers = []
        list(record(config, solo_mesh(device), 1, trainers.append))
        model = trainers[0].model
        produced[device] = generate(model, [1, 2, 3], Sampling(max_new_tokens=12), (), torch.float64)
    assert produced["cpu"] == produced["cuda"]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("layout", ["tp", "zero 3"])
def test_a_run_over_every_device_resumes(tmp_path, data, layout):
    """Through NCCL with as many ranks as there are devices, up to two."""
    ranks = min(2, torch.cuda.device_count())
    parallel = {"parallel__tp": ranks, "parallel__sp": True} if layout == "tp" else {"parallel__zero": 3}
    config = tiny_config(tmp_path, data, **parallel, train__precision="bfloat16")
    argv = [PYTHON, "-m", "launch", "run", str(config), f"--nproc={ranks}"]
    run_job([*argv, "--train.steps=6"], timeout=200, cold=True).expect(0)
    run_job(argv, timeout=200, cold=True).expect(0, stdout=r"resumed \S+step_00000006")
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 0
