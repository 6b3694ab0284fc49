"""The three adapters, each by the suite; resuming in the two frameworks."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torch_prepared.hooks import EditHook, EverySteps, attach
from torch_prepared.testing.hook import (
    BATCH,
    HookSuite,
    flipped_corner,
    small_network,
    two_moons_like,
)

ADAPTERS = Path(__file__).parents[2] / "torch_prepared" / "hooks" / "adapters"


def _batches(data, count):
    x, y = data
    for k in range(count):
        chosen = torch.arange(k * BATCH, (k + 1) * BATCH) % len(x)
        yield x[chosen], y[chosen]


class TestPlain(HookSuite):
    def train(self, hook, model, data, steps, accumulate, folder):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(hook, model, optimizer) as loop:
            for k, (x, y) in enumerate(_batches(data, steps * accumulate), start=1):
                (F.cross_entropy(model(x), y) / accumulate).backward()
                if k % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        return loop.result

    def test_nothing_is_certified_after_an_exception(self):
        model = small_network()
        hook = EditHook(flipped_corner())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(KeyboardInterrupt), attach(hook, model, optimizer) as loop:
            raise KeyboardInterrupt
        assert loop.result is None
        optimizer.step()
        assert hook.last_step == 0


lightning = pytest.importorskip("lightning", reason="lightning is not installed")


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(hook, model, data, folder, checkpoint=None, finish=True, **options):
    from torch_prepared.hooks import EditCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = EditCallback(hook, finish=finish)
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **{"max_epochs": -1, **options},
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data), batch_size=BATCH)
    trainer.fit(Classifier(model), loader, ckpt_path=checkpoint, weights_only=True)
    return trainer, callback


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, logging and lengths
class TestLightning(HookSuite):
    def train(self, hook, model, data, steps, accumulate, folder):
        _, callback = _fit(
            hook, model, data, folder, max_steps=steps, accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
        )  # fmt: skip
        return callback.result

    def test_resumed_training_continues_bit_for_bit(self, tmp_path):
        data, models, hooks = two_moons_like(), [], []
        for stops in ((2,), (1, 2)):  # Lightning repeats itself exactly from epochs' ends only
            checkpoint = None
            for stop in stops:
                model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(2))
                trainer, _ = _fit(
                    hook, model, data, tmp_path, checkpoint, finish=False, max_epochs=stop,
                    enable_checkpointing=False,
                )  # fmt: skip
                checkpoint = tmp_path / f"{stop}.ckpt"
                trainer.save_checkpoint(checkpoint)
            models.append(model)
            hooks.append(hook)
        assert [r.step for r in hooks[0].records] == [r.step for r in hooks[1].records]
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


class Rows(Dataset):
    def __init__(self, data) -> None:
        self.x, self.y = data

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k):
        return {"x": self.x[k], "labels": self.y[k]}


class WithLoss(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, labels=None):
        logits = self.network(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _hf_train(hook, model, data, folder, steps, accumulate=1, resume=None, **options):
    from torch_prepared.hooks import EditTrainerCallback

    callback = EditTrainerCallback(hook, select=lambda whole: whole.network)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=1e9, report_to=[], use_cpu=True,
        disable_tqdm=True, **{"save_strategy": "no", **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        WithLoss(model), arguments, train_dataset=Rows(data), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return callback


@pytest.mark.filterwarnings("ignore")  # accelerate's advice on pinned memory
class TestTransformers(HookSuite):
    def train(self, hook, model, data, steps, accumulate, folder):
        return _hf_train(hook, model, data, folder, steps, accumulate).result

    def test_resumed_training_continues_bit_for_bit(self, tmp_path):
        data, models, hooks = two_moons_like(), [], []
        for resume in (None, str(tmp_path / "checkpoint-4")):
            model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(2))
            hook.finish = lambda model: None
            _hf_train(
                hook, model, data, tmp_path, 8, resume=resume, save_strategy="steps", save_steps=4
            )
            models.append(model)
            hooks.append(hook)
        assert [r.step for r in hooks[0].records] == [r.step for r in hooks[1].records]
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.py")), ids=lambda p: p.stem)
def test_adapters_are_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("name", "extra"), [("EditCallback", "lightning"), ("EditTrainerCallback", "hf")]
)
def test_a_missing_framework_names_its_extra(name, extra):
    code = f"""
import sys
sys.modules["lightning"] = sys.modules["lightning.pytorch"] = sys.modules["transformers"] = None
import torch_prepared.hooks as hooks
from torch_prepared.errors import MissingDependencyError
try:
    hooks.{name}
except MissingDependencyError as error:
    assert "torch_prepared[{extra}]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
