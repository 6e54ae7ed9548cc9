"""The same LoRA training by the peft library: the same losses, step for step."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.checkpoint.opening import open_peft
from megatron_lite.config import parse_config
from megatron_lite.data.batch import Batch
from megatron_lite.distributed.mesh import solo_mesh
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.optional import optional

peft = optional("peft")
transformers = optional("transformers", "hf")

STEPS, BATCH, LENGTH, VOCAB, LR = 20, 4, 32, 61, 1e-2


def batches():
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, VOCAB, (STEPS, BATCH, 1), generator=generator)
    return (start + torch.arange(LENGTH + 1) * 3) % VOCAB  # something that can be learned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_the_loss_curve_is_theirs(tmp_path, rslora):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    )
    llama.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora)
    theirs = peft.get_peft_model(llama, settings)
    theirs.save_pretrained(tmp_path / "adapter")  # as it starts: A is theirs

    base = HuggingFaceSource(tmp_path / "base")
    adapter = open_peft(tmp_path / "adapter", base)
    config = parse_config(
        {
            "model": base.model.model_dump(),
            "data": {"train": [{"path": "none"}], "seq_len": LENGTH},
            "optim": {"lr": LR, "weight_decay": 0.0, "clip": 0.0, "schedule": "constant"},
            "train": {"global_batch_size": BATCH, "micro_batch_size": BATCH, "steps": STEPS},
            "init": {"from": str(tmp_path / "base")},
            "peft": adapter.peft.model_dump(),
        }
    )
    ours = Trainer(config, solo_mesh(), make_plan(config, 1), Faults.none())
    base.load(ours.engine.frozen())
    adapter.load({name: piece for name, piece in ours.engine.pieces().items() if name.startswith("model.")})
    ours.engine.loaded(0)

    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    wanted, got = [], []
    for index, rows in enumerate(batches()):
        loss = F.cross_entropy(theirs(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
        got.append(ours.train_step([Batch(rows[:, :-1], rows[:, 1:], None, None, index * BATCH)]).loss)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < wanted[0] - 0.3
