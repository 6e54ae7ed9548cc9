"""Every method teaches a frozen base a language that it does not know, down to a stated loss.

A language is a ring of all tokens: each is followed by its neighbour, and one time in ten by any token. Whoever knows
the ring has a loss of 0.57, whoever knows how often tokens occur one of log 16 = 2.77. The base knows another ring.
"""

import math

import pytest
import torch

from megatron_lite.config import parse_config
from megatron_lite.data.batch import Batch
from megatron_lite.distributed.mesh import solo_mesh
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer

VOCAB, LENGTH, BATCH, NOISE = 16, 16, 16, 0.1
KNOWN, NEW = 1, 2
UNIGRAM = math.log(VOCAB)
LIKELY, OTHER = 1 - NOISE + NOISE / VOCAB, NOISE / VOCAB
FLOOR = -LIKELY * math.log(LIKELY) - (VOCAB - 1) * OTHER * math.log(OTHER)
SMALL = {"method": "adapter", "size": 16}
METHODS = {  # the section, the learning rate, and the loss that is reached
    "lora": ({"method": "lora", "targets": ["*"]}, 0.01, 0.8),
    "dora": ({"method": "lora", "targets": ["blocks.*"], "dora": True}, 0.01, 0.8),
    "houlsby": (SMALL, 0.02, 0.9),
    "pfeiffer": ({**SMALL, "placement": "pfeiffer"}, 0.02, 0.9),
    "parallel": ({**SMALL, "placement": "parallel", "scale": 4.0}, 0.02, 0.8),
    "prefix": ({"method": "prefix", "length": 16}, 1.0, 1.5),
    "prefix by an mlp": ({"method": "prefix", "length": 16, "reparameterize": 32}, 0.1, 1.5),
}


def text(language, batches, seed):
    """Batches of a language; the seed draws where they begin, and the noise."""
    ring = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(language))
    after = torch.empty_like(ring)
    after[ring] = ring.roll(-1)
    draw = torch.Generator().manual_seed(seed)
    for index in range(batches):
        tokens = [torch.randint(VOCAB, (BATCH,), generator=draw)]
        for _ in range(LENGTH):
            noise = torch.rand(BATCH, generator=draw) < NOISE
            tokens.append(torch.where(noise, torch.randint(VOCAB, (BATCH,), generator=draw), after[tokens[-1]]))
        rows = torch.stack(tokens, dim=1)
        yield Batch(rows[:, :-1], rows[:, 1:], None, None, index * BATCH)


def trainer(method, lr, steps):
    sections = {
        "model": {"vocab_size": VOCAB, "vocab_multiple": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 4},
        "data": {"train": [{"path": "none"}], "seq_len": LENGTH},
        "optim": {"lr": lr, "weight_decay": 0.0, "schedule": "linear", "warmup_steps": 2},
        "train": {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    }
    config = parse_config({**sections, "peft": method})
    return Trainer(config, solo_mesh(), make_plan(config, 1), Faults.none())


def held_out(trained, language):
    return trained.evaluate([[batch] for batch in text(language, 8, seed=5)])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small only wait for a second one, long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    """The weights of a model that knows one language, and what it makes of the other."""
    learned = trainer(None, 0.01, 50)
    for batch in text(KNOWN, 50, seed=3):
        learned.train_step([batch])
    assert held_out(learned, KNOWN) < 0.8
    return {name: weight.clone() for name, weight in learned.engine.local_weights().items()}, held_out(learned, NEW)


@pytest.mark.parametrize("method", METHODS)
def test_it_reaches_a_loss_that_the_frozen_base_cannot(base, method):
    (weights, alone), (section, lr, reached) = base, METHODS[method]
    learner = trainer(section, lr, 80)
    held = learner.engine.local_weights()
    for name, weight in weights.items():
        held[name].copy_(weight)
    assert held_out(learner, NEW) == pytest.approx(alone, abs=0.2 if "prefix" in method else 1e-6)
    for batch in text(NEW, 80, seed=4):
        learner.train_step([batch])
    assert all(torch.equal(held[name], weight) for name, weight in weights.items())
    assert {name.rpartition(".")[0] for name in learner.engine.optimizer_state()} == learner.engine.trained

    assert FLOOR - 0.1 < held_out(learner, NEW) < reached
    assert reached < UNIGRAM - 1.2 < UNIGRAM < alone  # which is the frozen base's loss, however long it is run
