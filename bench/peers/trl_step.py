"""TRL's trainer on supersense, one optimizer step at a time, as a worker that a bench drives (bench/workers.py).

It takes the flags of trl_supersense.py and is that run, but between steps it waits for its turn. A step's seconds hold
all that the trainer does from one turn to the next: the batch, the step, its log. `tokens` are the step's, without
padding; `padding` is what was computed beside them.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # workers.py

import torch
from transformers import TrainerCallback

from peers.trl_supersense import build_trainer, parse, settings_of, versions
from workers import Turns


class InTurn(TrainerCallback):
    """Lets a trainer step when it is its turn, and tells what the step was."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.values = {"tokens": 0, "padding": 0, "loss": 0.0}
        self._step = trainer.training_step
        trainer.training_step = self.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"]
        tokens = int(mask.sum())
        loss = self._step(model, inputs, *args, **kwargs)
        self.values = {"tokens": tokens, "padding": mask.numel() - tokens, "loss": float(loss)}
        return loss

    def on_train_begin(self, args, state, control, **kwargs):
        tokens = sum(map(len, self.trainer.train_dataset["input_ids"]))
        about = {"settings": settings_of(self.trainer), "versions": versions()}
        self.turns = Turns(tokens_per_epoch=tokens, steps=state.max_steps, **about)
        self.go_on(control)

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.done(self.values)
        self.go_on(control)

    def go_on(self, control) -> None:
        """Wait; without another turn the training ends."""
        control.should_training_stop = not self.turns.wait()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
        trainer.add_callback(InTurn(trainer))
        trainer.train()


if __name__ == "__main__":
    main()
