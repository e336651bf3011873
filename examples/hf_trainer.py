# hf_trainer.py - run with: python hf_trainer.py, or torchrun --nproc-per-node 2 hf_trainer.py
"""transformers.Trainer saves both halves, and resumes when the script is started again."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dcp_hf_writer.integrations.trainer import HFDualCallback

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=1000))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1000, (64, 16))]
args = TrainingArguments(
    "out",
    max_steps=20,
    per_device_train_batch_size=2,
    save_steps=5,
    save_total_limit=2,
    logging_steps=1,
    report_to=[],
    # On several ranks with FSDP2: fsdp=True, fsdp_config={"fsdp_version": 2}
)
callback = HFDualCallback(
    resume=True,  # from the newest step, if there is one
    export_every=10,  # steps 10 and 20 get the HuggingFace half too
    on_saved=lambda step, path, report: print(f"saved {path} in {report.seconds:.1f} s"),
)
trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
trainer.train()
print(f"resume from out/step-{trainer.state.global_step}, serve out/hf-latest")
