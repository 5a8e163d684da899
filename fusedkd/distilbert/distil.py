"""The stages, in order: text and tokenizer, teacher, student. A model that is finished is not trained again."""

import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedModel, TrainerState
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert import data
from fusedkd.distilbert.config import Config, parse_terms
from fusedkd.distilbert.student import (
    Teacher,
    check_folding,
    layers_of,
    load_teacher,
    name_tokenizer_class,
    new_teacher,
    student_from_teacher,
    tokenizer_for,
)
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations import blocks
from fusedkd.integrations.command import parse_divergence, refused
from fusedkd.integrations.interrupt import STATE
from fusedkd.integrations.run_folder import by_name, claim, is_finished, is_kept
from fusedkd.nn import DistilBertLoss

EVAL_SEED = 0  # the held-out masks are the same for every model and every run
PLAIN: dict[str, Any] = {"loss": DistilBertLoss(alpha_distil=0.0, alpha_mlm=1.0, alpha_cos=0.0)}  # no teacher
OLDEST_TRANSFORMERS = "4.51"  # older ones lose the bias of RoBERTa's head, or cannot read the tokenizers of today
Logs = list[dict[str, float]]  # what a Trainer logged


@dataclass
class Run:
    """What all stages share."""

    config: Config
    tokenizer: Tokenizer
    teacher: Teacher | None  # None: to be trained here
    train: Any
    held_out: Any
    counts: np.ndarray  # how often each token occurs in the training blocks
    contents: dict[str, int]  # checksums of what names do not tell

    def collator(self, seed: int) -> Any:
        if self.tokenizer.mask_token_id is None:
            return blocks.CausalCollator(self.tokenizer)
        text = self.config.text
        return blocks.MaskingCollator(self.tokenizer, self.counts, text.mlm_probability, text.mask_smoothing, seed)

    def say(self, text: str) -> None:
        if self.config.training.process_index == 0:
            print(text, flush=True)


def distil(config: Config) -> None:
    """Everything, from the text to the student and a few lines about it."""
    run = prepare(config)
    begin_folder(run, config, "student")  # refuses one that is taken before the teacher is trained
    teacher, teacher_logs = teacher_of(run)
    first, *_, last = evaluations(student_of(run, config, teacher))
    run.say(f"teacher            {shown(evaluations(teacher_logs)[-1])}")
    run.say(f"student as copied  {shown(first)}")
    run.say(f"student            {shown(last)}\nthe student is in {config.folder / 'student'}")


def prepare(config: Config, new_head: bool = False) -> Run:
    """Text, tokenizer, blocks and a teacher from elsewhere. Nothing is written before everything has been read.

    With `new_head` that teacher may lack its language-modelling head.
    """
    text, saved, training = config.text, config.folder / "teacher", config.training
    with training.main_process_first(local=False):  # the other ranks find what the first one wrote
        tokenizer, teacher = data.load_vocab(text.vocab_file) if text.vocab_file else None, None
        if config.teacher.teacher:
            vocab = tokenizer.get_vocab() if tokenizer else None
            teacher, tokenizer = load_teacher(config.teacher.teacher, text.block_size, vocab, new_head)
            check_folding(config.student.fold_token_type, teacher.config.model_type)
        layers_of(config.student, depth_of(config, teacher))  # refuses what cannot be
        begun = is_kept(saved) or training.process_index > 0
        if tokenizer is None and begun and (saved / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(saved)
        train_text, eval_text = data.read_text(text)
        if tokenizer is None:
            tokenizer = data.train_tokenizer(train_text, text.vocab_size)
        if teacher is None:
            tokenizer.model_max_length = text.block_size
        cut = blocks.by_length if text.sequences == "by_length" else blocks.pack
        train = cut(train_text, tokenizer, text.block_size, "training", text.num_proc)
        held_out = cut(eval_text, tokenizer, text.block_size, "held-out", text.num_proc)
        if 0 < text.eval_blocks < len(held_out):
            held_out = held_out.shuffle(seed=EVAL_SEED).select(range(text.eval_blocks))
        vocab_size = teacher.config.vocab_size if teacher else len(tokenizer)
        counts = data.token_counts(train, vocab_size)
        contents = {"training text": counts, "held-out text": data.token_counts(held_out, vocab_size)}
        if teacher:
            contents["weights of the teacher"] = np.concatenate(
                [p.detach().flatten()[:1024].numpy() for p in teacher.parameters()]
            )
        checksums = {name: zlib.crc32(content.tobytes()) for name, content in contents.items()}
        run = Run(config, tokenizer, teacher, train, held_out, counts, checksums)
        size = "a stream" if text.streaming else f"{counts.sum():,} tokens in {len(train):,} blocks"
        run.say(f"text: {size}; {len(held_out):,} blocks held out; a vocabulary of {vocab_size:,}")
        if teacher is None:
            begin_folder(run, config, "teacher")
            if not begun:
                tokenizer.save_pretrained(saved)
    return run


# ---- models


def depth_of(config: Config, teacher: Teacher | None) -> int:
    """Layers of the teacher, given or to be trained here."""
    return teacher.config.num_hidden_layers if teacher else config.teacher.teacher_layers


def teacher_of(run: Run) -> tuple[Teacher, Logs]:
    """The teacher, given or trained here, and what was logged of it."""
    config, teacher = run.config, run.teacher
    if teacher is not None:  # not sharded: it is needed whole
        trainer = make_trainer(run, config, config.folder, teacher, None, PLAIN, fsdp=None, report_to="none")
        return teacher, [trainer.evaluate()]
    size, options = (len(run.tokenizer), config.text.block_size), config.teacher
    of_its_own = {"max_steps": options.teacher_steps, "learning_rate": options.teacher_learning_rate}
    logs = train(run, config, "teacher", lambda: new_teacher(options, *size), None, PLAIN, **of_its_own)
    return BertForMaskedLM.from_pretrained(config.folder / "teacher"), logs


def student_of(run: Run, config: Config, teacher: Teacher, name: str = "student") -> Logs:
    """The student that the options describe, into the folder `name`; what was logged of it."""
    options, of = config.student, config.loss
    layers = layers_of(options, depth_of(config, teacher))
    copied = tuple((i + 1, layer + 1) for i, layer in enumerate(layers))  # hidden state 0 is the embeddings'
    loss = {
        "loss": DistilBertLoss(of.temperature, of.alpha_distil, of.alpha_mlm, of.alpha_cos, of.kd_on),
        "divergence": parse_divergence(of.divergence, of.temperature),
        "alpha_mse": of.alpha_mse,
        "terms": parse_terms(of),
        "cos_layers": copied if of.cos_layers == "copied" else ((-1, -1),),
    }
    frozen = options.freeze_position_embeddings, options.freeze_token_embeddings

    def make() -> PreTrainedModel:
        return student_from_teacher(teacher, layers, options.init, options.fold_token_type, *frozen)

    return train(run, config, name, make, teacher, loss)


def make_trainer(
    run: Run, config: Config, folder: Path, model: Any, teacher: Teacher | None, loss: dict[str, Any], **own: Any
) -> DistilBertTrainer:
    arguments = replace(config.training, output_dir=str(folder), **config.text.trainer_arguments, **own)
    rows = data.in_order(run.train, arguments.train_batch_size * arguments.world_size, arguments.seed)
    with refused():
        return DistilBertTrainer(
            model,
            teacher,
            arguments,
            run.collator(arguments.seed),
            rows,
            run.held_out,
            tokenizer_for(model.config, run.tokenizer),
            eval_collator=run.collator(EVAL_SEED),
            **loss,
        )


def train(
    run: Run,
    config: Config,
    name: str,
    make: Callable[[], Any],
    teacher: Teacher | None,
    loss: dict[str, Any],
    **own: Any,
) -> Logs:
    """Train one model into the folder `name`, or read what an earlier run left there; what the Trainer logged."""
    folder, resume = config.folder / name, config.training.resume_from_checkpoint
    with config.training.main_process_first(local=False):
        checkpoint = begin_folder(run, config, name)
    if is_finished(folder):
        run.say(f"{name}: reusing {folder}")
        return TrainerState.load_from_json(str(folder / STATE)).log_history
    torch.manual_seed(config.training.seed)
    model = make()
    trainer = make_trainer(run, config, folder, model, teacher, loss, **own)
    begin = f", resumed from {checkpoint}" if checkpoint else ", from the start (no checkpoint to resume)"
    run.say(f"{name}: {model.num_parameters():,} parameters, {trainer.args.max_steps} steps{begin if resume else ''}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint:
        trainer.state.log_history.pop()  # the runtime, which is not that of all steps
    trainer.save_model()
    final = trainer.final_evaluation()
    if trainer.is_world_process_zero():
        name_tokenizer_class(folder)
        write_card(config, folder, model, teacher, final)
        trainer.state.save_to_json(str(part := folder / f"{STATE}.part"))
        part.replace(folder / STATE)  # last, and whole: now it is finished
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history


def begin_folder(run: Run, config: Config, name: str) -> str | None:
    settings = config.teacher_settings() if name == "teacher" else config.settings()
    return claim(config.folder / name, settings | run.contents, config.training.resume_from_checkpoint)


# ---- what is told


def evaluations(logs: Logs) -> Logs:
    return [entry for entry in logs if "eval_ce" in entry]


def shown(found: dict[str, float]) -> str:
    kl = f", KL to the teacher {found['eval_kl']:.3f}" if "eval_kl" in found else ""
    return f"held-out loss {found['eval_ce']:.3f}, perplexity {found['eval_perplexity']:.1f}{kl}"


def write_card(config: Config, folder: Path, model: Any, teacher: Teacher | None, found: dict[str, float]) -> None:
    """README.md of a model: what it was made of, how good it is, how it is loaded."""
    task, kind = ("text-generation", "CausalLM") if model.can_generate() else ("fill-mask", "MaskedLM")
    given, text, name = config.teacher.teacher, config.text, folder.resolve().name
    made_of = (
        by_name(text.dataset) or ", ".join(by_name(text.train_files)) or "the documentation that comes with Python"
    )
    source = f", distilled from {by_name(given) or 'a BERT of the same text'} after arXiv:1910.01108" if teacher else ""
    known: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["fusedkd"]}
    known |= {"base_model": given} if teacher and given and by_name(given) == given else {}
    card = f"""---
{ModelCardData(**known).to_yaml()}
---
# {name}

A {type(model).__name__} of {model.config.num_hidden_layers} layers and {model.num_parameters():,} parameters, trained on {made_of}{source}.
Its {shown(found)}. All settings are in run.json, what was logged in {STATE}.

transformers {OLDEST_TRANSFORMERS} or newer; `{name}` stands for the path of this folder, or its name on the hub:

```python
from transformers import AutoModelFor{kind}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelFor{kind}.from_pretrained("{name}")
```
"""  # noqa: E501
    ModelCard(card).save(folder / "README.md")
