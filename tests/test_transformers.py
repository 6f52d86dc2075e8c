"""The Hugging Face Trainer with IGMOptimizer: the weights it ends with are those of a plain loop, to the bit."""

import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from models import same
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers", reason="needs the extra igm-rs[transformers]")
pytest.importorskip("accelerate", reason="needs the extra igm-rs[transformers]")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
)

from igm_rs import IGMOptimizer
from igm_rs.integrations.transformers import IGMTrainer, IGMTrainerMixin

VOCABULARY, LENGTH, CLASSES, BATCH = 40, 8, 3, 4


def config(dropout=0.0):
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def classifier(dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return BertForSequenceClassification(config(dropout))


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row[0] % CLASSES} for row in ids]


def arguments(tmp_path, **changed):
    given = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(tmp_path), **(given | changed))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry and "step" in entry and "loss" in entry]


def batches_of(data, size=BATCH):
    return [default_data_collator(data[i : i + size]) for i in range(0, len(data), size)]


def equal(model, other):
    """Whether all parameters and buffers of two models are equal to the bit."""
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


class PlainLoop:
    """What a user without a Trainer writes: the Trainer's AdamW and linear schedule around ``step(closure)``."""

    def __init__(self, model, args, **igm):
        self.model, self.args = model, args
        base = Trainer(model=model, args=args).create_optimizer()
        self.opt = IGMOptimizer(base, model=model, **igm)
        self.scheduler = get_scheduler("linear", self.opt, 0, args.max_steps)
        self.lrs, self.losses = [], []
        model.train()

    def loss(self, batch, items):
        return self.model(**batch).loss

    def closure(self, micro_batches, items=None):
        """One closure for the step: clears, all micro-batches, clipping."""

        def closure():
            self.opt.zero_grad()
            total = 0.0
            for batch in micro_batches:
                loss = self.loss(batch, items)
                loss.backward()
                total = total + loss.detach()
            if self.args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            return total

        return closure

    def part(self, batch, items=None):
        """The closure of one micro-batch, for the list of closures: it does not clear."""

        def closure():
            loss = self.loss(batch, items)
            loss.backward()
            return loss

        return closure

    def step(self, closure):
        self.lrs.append(self.scheduler.get_last_lr()[0])
        self.losses.append(self.opt.step(closure).item())
        self.scheduler.step()


# --- SAM, one batch a step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_weights_losses_and_rates_are_those_of_a_plain_loop(tmp_path, optim, max_grad_norm):
    args = arguments(tmp_path, optim=optim, max_grad_norm=max_grad_norm)
    data = sentences(24)
    model, twin = classifier(), classifier()
    trainer = IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05})
    trainer.train()
    plain = PlainLoop(twin, args, rho=0.05)
    for batch in batches_of(data):
        plain.step(plain.closure([batch]))
    assert equal(model, twin)
    assert logged(trainer, "loss") == plain.losses
    assert logged(trainer, "learning_rate") == plain.lrs
    assert trainer.igm_optimizer.unperturbed_steps == 0
    assert trainer.igm_optimizer.last_stats["loss"] == pytest.approx(plain.losses[-1], rel=1e-6)
    assert trainer.igm_optimizer.last_stats["loss_perturbed"] != plain.losses[-1]
    if max_grad_norm:  # the gradient of the second pass was clipped as well, or the norms would not bind
        assert min(logged(trainer, "grad_norm")) > max_grad_norm
        assert trainer.igm_optimizer.last_stats["grad_norm_perturbed"] == pytest.approx(max_grad_norm, rel=1e-5)


def test_without_sam_it_is_the_trainer_itself(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.1)
    data = sentences(24)
    model, twin = classifier(dropout=0.1), classifier(dropout=0.1)
    for kind, it, options in ((IGMTrainer, model, {"igm": {"rho": 0.0}}), (Trainer, twin, {})):
        torch.manual_seed(3)
        kind(it, args, train_dataset=data, **options).train()
    assert equal(model, twin)


def test_sam_moves_the_weights_elsewhere(tmp_path):
    data = sentences(24)
    model, twin = classifier(), classifier()
    IGMTrainer(model, arguments(tmp_path), train_dataset=data, igm={"rho": 0.05}).train()
    Trainer(twin, arguments(tmp_path), train_dataset=data).train()
    assert not equal(model, twin)


def test_it_learns(tmp_path):
    """The class follows from the first word, which two epochs of 60 steps teach it."""
    args = arguments(tmp_path, max_steps=120, learning_rate=5e-3, max_grad_norm=1.0)
    data = sentences(240)
    trainer = IGMTrainer(classifier(0.1), args, train_dataset=data, igm={"rho": 0.02, "preserve_rng": True})
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        whole = default_data_collator(data)
        accuracy = (model(whole["input_ids"]).logits.argmax(1) == whole["labels"]).double().mean()
    assert accuracy > 0.9
    assert trainer.igm_optimizer.skipped_steps == 0


# --- gradient accumulation ------------------------------------------------------------------------------------------


def masked_sentences(count):
    """Each sentence with another number of words to be guessed, so that micro-batches weigh differently."""
    data = []
    for i, entry in enumerate(sentences(count)):
        labels = entry["input_ids"].clone()
        labels[1 + i // BATCH + i % BATCH :] = -100
        data.append({"input_ids": entry["input_ids"], "labels": labels})
    return data


def loss_of_words(outputs, labels, num_items_in_batch):
    """The loss of a language model: a sum over the words of the micro-batch, over the number of words in the step."""
    logits = outputs.logits.view(-1, VOCABULARY)
    return cross_entropy(logits, labels.view(-1), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("as_list", [True, False])
def test_a13_accumulation_of_two_is_the_list_of_closures(tmp_path, as_list):
    """Six batches make three steps; the micro-batches of a step count by their words (num_items_in_batch)."""
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3, max_grad_norm=0.0 if as_list else 0.1)
    data = masked_sentences(24)
    torch.manual_seed(1)
    model = BertForMaskedLM(config())
    twin = copy.deepcopy(model)
    trainer = IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05}, compute_loss_func=loss_of_words)
    trainer.train()
    plain = PlainLoop(twin, args, rho=0.05)
    plain.loss = lambda batch, items: loss_of_words(twin(batch["input_ids"]), batch["labels"], items)
    micro_batches = batches_of(data)
    for pair in zip(micro_batches[::2], micro_batches[1::2], strict=True):
        words = [int((batch["labels"] != -100).sum()) for batch in pair]
        assert words[0] != words[1]

        if as_list:
            plain.step([plain.part(batch, sum(words)) for batch in pair])
        else:
            plain.step(plain.closure(pair, sum(words)))
    assert equal(model, twin)
    assert logged(trainer, "loss") == plain.losses


class Regression(nn.Module):
    """A model without keyword arguments for the loss: the Trainer itself divides by the number of micro-batches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x, y):
        return {"loss": (self.linear(x)[:, 0] - y).square().mean()}


def test_a13_an_epoch_that_ends_within_an_accumulation(tmp_path):
    """Five batches, two a step: the third step of each epoch has one micro-batch, in both passes."""
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=6, optim="sgd")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5 * BATCH, 5, generator=generator)
    data = [{"x": row, "y": row.sum()} for row in x]
    torch.manual_seed(1)
    model = Regression()
    twin = copy.deepcopy(model)
    IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05}).train()
    plain = PlainLoop(twin, args, rho=0.05)
    plain.loss = lambda batch, items: twin(**batch)["loss"] / items
    micro_batches = batches_of(data)
    for _ in range(2):
        for step in (micro_batches[:2], micro_batches[2:4], micro_batches[4:]):
            plain.step([plain.part(batch, len(step)) for batch in step])
    assert equal(model, twin)


class StopWithin(TrainerCallback):
    """Stops the training after the first micro-batch of the second step."""

    def on_substep_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 1


def test_a_training_stopped_within_an_accumulation_leaves_nothing_to_the_next(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    data = sentences(24)
    trainer = IGMTrainer(classifier(), args, train_dataset=data, igm={"rho": 0.05}, callbacks=[StopWithin()])
    trainer.train()
    assert trainer.state.global_step == 1
    halfway, state = copy.deepcopy(trainer.model), copy.deepcopy(trainer.igm_optimizer.state_dict())
    trainer.remove_callback(StopWithin)
    trainer.train()
    other = IGMTrainer(halfway, args, train_dataset=data, igm={"rho": 0.05})
    other.create_optimizer()
    other.optimizer.load_state_dict(state)
    for group in other.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    other.train()
    assert equal(trainer.model, other.model)


# --- dropout --------------------------------------------------------------------------------------------------------


class NoteRandomState(TrainerCallback):
    """Keeps the state of torch's generator as it was at the first forward pass."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.state = torch.get_rng_state()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a11_preserve_rng_draws_the_same_masks(tmp_path, accumulation):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=6 // accumulation)
    data = sentences(24)
    model, twin = classifier(dropout=0.3), classifier(dropout=0.3)
    note = NoteRandomState()
    masks = []
    model.dropout.register_forward_hook(lambda _, __, out: masks.append(out == 0))
    IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05, "preserve_rng": True}, callbacks=[note]).train()
    plain = PlainLoop(twin, args, rho=0.05, preserve_rng=True)
    torch.set_rng_state(note.state)
    micro_batches = batches_of(data)
    for i in range(0, len(micro_batches), accumulation):
        plain.step(plain.closure(micro_batches[i : i + accumulation]))
    assert equal(model, twin)
    for i in range(0, len(masks), 2 * accumulation):  # masks of the last layer: pass 1, then the same in pass 2
        first, second = masks[i : i + accumulation], masks[i + accumulation : i + 2 * accumulation]
        assert all(map(torch.equal, first, second))
        assert len(first) == len(second) == accumulation
        assert first[0].any()
    assert not torch.equal(masks[0], masks[2 * accumulation])


# --- precision ------------------------------------------------------------------------------------------------------


def test_bf16_on_the_cpu(tmp_path):
    args = arguments(tmp_path, bf16=True, max_grad_norm=0.1)
    data = sentences(24)
    model, twin = classifier(), classifier()
    trainer = IGMTrainer(model, args, train_dataset=data, igm={"rho": 0.05})
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"

    class Autocast(PlainLoop):
        def loss(self, batch, items):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(**batch).loss

    plain = Autocast(twin, arguments(tmp_path, max_grad_norm=0.1), rho=0.05)
    for batch in batches_of(data):
        plain.step(plain.closure([batch]))
    assert equal(model, twin)
    assert logged(trainer, "loss") == plain.losses


class ScaledTrainer(IGMTrainer):
    """16-bit training as on a GPU: Accelerate refuses it on a CPU, so the scaler and autocast are put in by hand."""

    scale = 2.0**10
    spoil = ()
    calls = 0

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.calls in self.spoil else loss


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_fp16_is_a_plain_loop_with_a_scaler(tmp_path, max_grad_norm):
    changed = {"max_grad_norm": max_grad_norm, "optim": "sgd"}
    data = sentences(24)
    model, twin = classifier(), classifier()
    trainer = ScaledTrainer(model, arguments(tmp_path, **changed), train_dataset=data, igm={"rho": 0.05})
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == ScaledTrainer.scale
    assert trainer.igm_optimizer.skipped_steps == 0
    plain = PlainLoop(twin, arguments(tmp_path, **changed), rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=ScaledTrainer.scale)
    for batch in batches_of(data):

        def closure(batch=batch):
            plain.opt.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = twin(**batch).loss
            scaler.scale(loss).backward()
            if max_grad_norm:
                nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm * scaler.get_scale())
            return loss

        plain.losses.append(plain.opt.step(closure, scaler=scaler).item())
        scaler.update()
        plain.scheduler.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # to the bit without clipping; the Trainer clips pass 1 after it was unscaled, which rounds otherwise
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7 if max_grad_norm else 0)
    assert logged(trainer, "loss") == pytest.approx(plain.losses, rel=1e-6 if max_grad_norm else 0, abs=0)
    single = classifier()
    IGMTrainer(single, arguments(tmp_path, **changed), train_dataset=data, igm={"rho": 0.05}).train()
    assert not equal(model, single), "autocast was on"


@pytest.mark.parametrize("spoilt", [3, 4], ids=["pass 1", "pass 2"])
def test_fp16_an_overflow_in_either_pass_skips_the_step_and_halves_the_scale_once(tmp_path, spoilt):
    """The second step overflows: its weights stay, and the third one is taken at half the scale."""
    args = arguments(tmp_path, max_steps=3, optim="sgd", lr_scheduler_type="constant")
    data = sentences(12)

    class Watch(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model, **_):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            self.seen.append((weights, trainer.accelerator.scaler.get_scale()))

    watch = Watch()
    trainer = ScaledTrainer(classifier(), args, train_dataset=data, igm={"rho": 0.05}, callbacks=[watch])
    trainer.spoil = (spoilt,)
    trainer.train()
    (one, _), (two, after), (three, end) = watch.seen
    assert torch.equal(one, two)
    assert not torch.equal(two, three)
    assert after == end == ScaledTrainer.scale / 2
    # an overflow of the first pass skips the second one
    assert trainer.calls == (5 if spoilt == 3 else 6)


def test_fp16_a_step_that_the_scaler_skips_leaves_nothing_behind(tmp_path):
    """Neither the features of its batch nor its second pass: the optimizer is as after the step before."""
    states = []
    for steps in (1, 2):
        model = two_modalities()
        trainer = ScaledTrainer(
            model,
            arguments(tmp_path, max_steps=steps, lr_scheduler_type="constant"),
            train_dataset=blocks(1, 3),
            igm=TWO,
        )
        trainer.spoil = (3,)
        trainer.train()
        states.append(copy.deepcopy(trainer.igm_optimizer.state_dict()))
        assert trainer.calls == 1 + steps
    assert same(*states)
    covariances = trainer.igm_optimizer.covariances["text"]
    assert len(covariances) == 2
    opt = trainer.igm_optimizer
    batch = batches_of(blocks(1, 3))[2]

    def closure():
        opt.zero_grad()
        loss = model(**batch)["loss"].float()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.last_stats["step"] == 2


# --- state ----------------------------------------------------------------------------------------------------------


class TwoModalities(nn.Module):
    """BERT for text, an encoder for images, and a head of two layers each."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.bert = BertModel(config(dropout))
        self.image = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.text_head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.image_head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, labels, input_ids=None, pixels=None):
        if pixels is None:
            logits = self.text_head(self.bert(input_ids).pooler_output)
        else:
            logits = self.image_head(self.image(pixels))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


TWO = {
    "modalities": {"text": ["bert.", "text_head."], "image": ["image.", "image_head."]},
    "heads": {"text": "text_head", "image": "image_head"},
    "rho": 0.05,
    "tau": 1.5,
    "preserve_rng": True,
}


def blocks(turns, steps):
    """A data set whose order makes the turns: `steps` batches of one modality, then of the other."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for turn in range(turns):
        for entry in sentences(steps * BATCH, seed=turn):
            pixels = torch.randn(6, generator=generator) + entry["labels"]
            data.append(entry if turn % 2 == 0 else {"pixels": pixels, "labels": entry["labels"]})
    return data


def two_modalities(dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return TwoModalities(dropout)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_modalities_in_turns_by_the_order_of_the_batches(tmp_path, accumulation):
    """Against a plain loop that opens the turns itself."""
    steps, turns = 4, 4
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=steps * turns // accumulation)
    data = blocks(turns, steps)
    model, twin = two_modalities(), two_modalities()
    trainer = IGMTrainer(model, args, train_dataset=data, igm=TWO)
    trainer.train()
    plain = PlainLoop(twin, args, **TWO)
    plain.loss = lambda batch, items: twin(**batch)["loss"] / accumulation
    micro_batches = batches_of(data)
    for turn in range(turns):
        with plain.opt.turn(("text", "image")[turn % 2]):
            for i in range(turn * steps, (turn + 1) * steps, accumulation):
                plain.step(plain.closure(micro_batches[i : i + accumulation]))
    assert equal(model, twin)
    assert logged(trainer, "loss") == plain.losses
    opt = trainer.igm_optimizer
    assert opt.turns == turns - 1  # the last turn ends when another modality steps
    assert opt.last_stats["active"] == "image"
    assert opt.last_stats["sources"] == ["text"]
    assert all(told["cosine"] < 1 - 1e-6 for told in opt.last_stats["projected"].values())


@pytest.mark.parametrize("what", ["bert", "two modalities, within a turn", "two modalities, between turns"])
def test_b1_resume_from_a_checkpoint_goes_on_bit_for_bit(tmp_path, what):
    """Dropout, warm-up and schedule, batches in random order (BERT) or in turns; the other trainer begins elsewhere."""
    at = 8 if what.endswith("between turns") else 6
    two = what != "bert"
    changed = {"max_steps": 12, "save_strategy": "steps", "save_steps": at, "warmup_steps": 3, "max_grad_norm": 1.0}
    if not two:
        changed["train_sampling_strategy"] = "random"
    data = blocks(4, 4) if two else sentences(28)  # 7 batches an epoch: the checkpoint is within the first
    igm = TWO if two else {"rho": 0.05, "preserve_rng": True}
    build = two_modalities if two else classifier

    def trainer(folder, seed):
        return IGMTrainer(build(0.2, seed=seed), arguments(folder, **changed), train_dataset=data, igm=igm)

    whole = trainer(tmp_path / "whole", seed=1)
    whole.train()
    resumed = trainer(tmp_path / "resumed", seed=2)
    assert not equal(whole.model, resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert equal(whole.model, resumed.model)
    assert same(whole.igm_optimizer.state_dict(), resumed.igm_optimizer.state_dict())
    assert logged(resumed, "loss")[at:] == logged(whole, "loss")[at:]
    assert len(logged(whole, "loss")) == 12
    saved = torch.load(tmp_path / "whole" / f"checkpoint-{at}" / "optimizer.pt", weights_only=True)  # B2
    assert saved["igm"]["counters"]["steps"] == at


def test_b5_a_checkpoint_of_the_plain_trainer_is_taken_up(tmp_path):
    data = sentences(24)
    changed = {"save_strategy": "steps", "save_steps": 3}
    Trainer(classifier(), arguments(tmp_path / "plain", **changed), train_dataset=data).train()
    model, twin = classifier(seed=2), classifier(seed=3)
    path = str(tmp_path / "plain" / "checkpoint-3")
    trainer = IGMTrainer(model, arguments(tmp_path / "igm"), train_dataset=data, igm={"rho": 0.0})
    trainer.train(resume_from_checkpoint=path)
    Trainer(twin, arguments(tmp_path / "other"), train_dataset=data).train(resume_from_checkpoint=path)
    assert equal(model, twin)


def test_evaluation_between_the_steps_changes_nothing(tmp_path):
    data = blocks(2, 4)
    model, twin = two_modalities(), two_modalities()
    args = arguments(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1)
    trainer = IGMTrainer(model, args, train_dataset=data, eval_dataset=data[: 2 * BATCH], igm=TWO)
    trainer.train()
    IGMTrainer(twin, arguments(tmp_path, max_steps=8), train_dataset=data, igm=TWO).train()
    assert equal(model, twin)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 8


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a5_what_is_raised_in_the_second_pass_leaves_the_weights(tmp_path, error):
    class Failing(IGMTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            if self.calls == 4:
                self.perturbed = copy.deepcopy(self.model)
                raise error("in pass 2 of the second step")
            return loss

    data = sentences(24)
    trainer = Failing(classifier(), arguments(tmp_path), train_dataset=data, igm={"rho": 0.05})
    with pytest.raises(error, match="in pass 2"):
        trainer.train()
    one_step = IGMTrainer(classifier(), arguments(tmp_path), train_dataset=data, igm={"rho": 0.05})
    one_step.add_callback(type("Stop", (TrainerCallback,), {"on_step_end": _stop}))
    one_step.train()
    assert one_step.state.global_step == 1
    assert equal(trainer.model, one_step.model)
    assert not equal(trainer.model, trainer.perturbed)
    assert trainer.train().global_step == 6  # and it trains on


def _stop(self, args, state, control, **_):
    control.should_training_stop = True


# --- two processes --------------------------------------------------------------------------------------------------


class Noting(Trainer):
    """Notes for each micro-batch whether DDP averages the gradients after it, or only accumulates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.averaged = []

    def training_step(self, model, *args, **kwargs):
        self.averaged.append(getattr(model, "require_backward_grad_sync", None))
        return super().training_step(model, *args, **kwargs)


class NotingIGM(IGMTrainerMixin, Noting):
    """The mixin before a trainer with a training step of its own, which pass 2 repeats."""


def regression(folder, size):
    """A run of 4 steps of two micro-batches of `size`, in float64."""
    torch.manual_seed(1)
    args = arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=2, max_steps=4, optim="sgd")
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = [{"x": row, "y": row.sum()} for row in x]
    return NotingIGM(Regression().double(), args, train_dataset=data, igm={"rho": 0.05})


def in_one_of_two_processes(rank, folder):
    """What each process does; a launcher would have set the environment."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    trainer = regression(folder, BATCH)
    trainer.train()
    told = {"weights": trainer.model.state_dict(), "averaged": trainer.averaged, "losses": logged(trainer, "loss")}
    torch.save(told, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Replicas are equal to the bit; one process sums in another order, which 1e-12 in float64 allows for."""
    torch.multiprocessing.spawn(in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(mine["weights"], theirs["weights"])
    assert mine["averaged"] == [False, True] * 2 * 4, "in each pass of each step after the last micro-batch only"
    one = regression(tmp_path, 2 * BATCH)
    one.train()
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(mine["weights"][key], value, rtol=0, atol=1e-12)
    assert mine["losses"] == pytest.approx(logged(one, "loss"), abs=1e-6)


# --- how it is given ------------------------------------------------------------------------------------------------


def test_the_optimizer_may_be_ready_or_named_by_class(tmp_path):
    data = sentences(24)
    ends = []
    for way in ("igm", "ready", "class", "around a ready base"):
        model = classifier()
        args = arguments(tmp_path, weight_decay=0.0)
        base = torch.optim.SGD(model.parameters(), lr=1e-2)
        given = {
            "igm": {"igm": {"rho": 0.05}, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})},
            "ready": {"optimizers": (IGMOptimizer(base, rho=0.05), None)},
            "class": {"optimizer_cls_and_kwargs": (IGMOptimizer, {"lr": 1e-2, "rho": 0.05})},
            "around a ready base": {"igm": {"rho": 0.05}, "optimizers": (base, None)},
        }[way]
        trainer = IGMTrainer(model, args, train_dataset=data, **given)
        trainer.train()
        assert type(trainer.igm_optimizer.base) is torch.optim.SGD
        assert trainer.igm_optimizer.rho == {"all": 0.05}
        assert trainer.igm_optimizer.unperturbed_steps == 0
        ends.append(model)
    for other in ends[1:]:  # groups in another order add up the norm in another order
        for p, q in zip(ends[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_second_training_goes_on_with_the_same_optimizer(tmp_path):
    trainer = IGMTrainer(classifier(), arguments(tmp_path, max_steps=2), train_dataset=sentences(8), igm={"rho": 0.05})
    trainer.train()
    opt = trainer.igm_optimizer
    trainer.train()
    assert trainer.igm_optimizer is opt
    assert opt.last_stats["step"] == 4


def test_model_init_and_the_mixin_before_another_trainer(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class Mine(IGMTrainerMixin, Doubled):
        pass

    def build():
        return classifier(seed=5)

    args = arguments(tmp_path, optim="sgd")
    data = sentences(24)
    trainer = Mine(model_init=build, args=args, train_dataset=data, igm={"rho": 0.05})
    trainer.train()
    plain = PlainLoop(build(), args, rho=0.05)
    plain.loss = lambda batch, items: 2 * plain.model(**batch).loss
    for batch in batches_of(data):
        plain.step(plain.closure([batch]))
    assert equal(trainer.model, plain.model)
    assert logged(trainer, "loss") == plain.losses


def test_bad_input(tmp_path):
    model = classifier()
    ready = IGMOptimizer(model.parameters(), lr=0.1)
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match="igm is a float, expected a mapping of IGMOptimizer's arguments"):
        IGMTrainer(model, args, igm=0.05)
    with pytest.raises(ValueError, match="igm is given with a ready IGMOptimizer, expected rho in the optimizer"):
        IGMTrainer(model, args, igm={"rho": 0.05}, optimizers=(ready, None))
    with pytest.raises(ValueError, match="igm is given with a ready IGMOptimizer"):
        IGMTrainer(model, args, igm={}, optimizer_cls_and_kwargs=(IGMOptimizer, {"lr": 0.1}))
    with pytest.raises(RuntimeError, match="the trainer's optimizer is a NoneType, expected an IGMOptimizer"):
        _ = IGMTrainer(model, args).igm_optimizer
    with pytest.raises(ValueError, match=r"rho.* is -1.*expected"):
        IGMTrainer(model, args, igm={"rho": -1}).create_optimizer()


@pytest.mark.parametrize("sharding", ["FSDP", "DeepSpeed"])
def test_a_sharded_gradient_is_refused(tmp_path, sharding):
    class Sharded(IGMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{sharding.lower()}_enabled", True)

    with pytest.raises(ValueError, match=f"ask for {sharding}, expected whole gradients in each process"):
        Sharded(classifier(), arguments(tmp_path))


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_the_extra_the_import_says_what_to_install(missing):
    script = f"""
import sys
sys.modules[{missing!r}] = None
import igm_rs
assert "transformers" not in {{name for name, module in sys.modules.items() if module is not None}}
try:
    import igm_rs.integrations.transformers
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pip install 'igm-rs[transformers]'")
