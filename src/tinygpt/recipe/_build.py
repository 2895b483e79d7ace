"""From a recipe to a trainer and what happens along the way."""

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinygpt.checkpoint import claim_run_folder
from tinygpt.data import DocumentSource, TokenShards, ValidationSet
from tinygpt.errors import ConfigError
from tinygpt.evals import evaluate_bpb
from tinygpt.generate import stream_text
from tinygpt.hub import check_repo_id
from tinygpt.layers import Linear, LMHead, MatmulPrecision, set_matmul_precision
from tinygpt.metrics import StepMetrics
from tinygpt.model import GPT
from tinygpt.optim import MuonAdamW, Rule, nanochat_rules, param_groups
from tinygpt.recipe._data import Source, make_loader, make_tokenizer, make_validation, open_training, open_validation
from tinygpt.recipe._files import RECIPE_FILE, absolute
from tinygpt.recipe._sections import PhaseRecipe, SamplesRecipe
from tinygpt.recipe._tracking import tracker_hooks
from tinygpt.scaling import lr_factor
from tinygpt.schedules import Schedule
from tinygpt.tokenizer import Tokenizer, load_tokenizer
from tinygpt.trackers import check_tracker
from tinygpt.trainer import Hook, Phase, Trainer, TrainerConfig, every, resolve_precision

if TYPE_CHECKING:
    from tinygpt.recipe._recipe import Recipe

logger = logging.getLogger("tinygpt")


@dataclass(frozen=True, eq=False)
class RecipeRun:
    """What a recipe makes: a trainer like any other, and what the recipe wants done along the way.

    Attributes:
        recipe: The recipe with nothing left open, as it is saved with the run.
        trainer: The trainer.
        hooks: Evaluation and samples, for `trainer.fit`.
        validation: What the run is measured on; `None` for nothing.
        out_dir: The run's folder.
        on_close: Called when training ends, however it ends.
    """

    recipe: "Recipe"
    trainer: Trainer
    hooks: tuple[Hook, ...]
    validation: ValidationSet | None
    out_dir: Path
    on_close: tuple[Callable[[], object], ...] = ()

    def fit(
        self,
        *,
        accept: Collection[str] | str = (),
        rewarm_steps: int | None = None,
        branch_from: str | Path | None = None,
        progress: bool = True,
    ) -> StepMetrics | None:
        """Go on from the newest checkpoint in the run's folder, or begin, and train to the end.

        Args:
            accept: As for `Trainer.load_state`.
            rewarm_steps: As for `Trainer.load_state`.
            branch_from: Begin with the state of this checkpoint, of another run; without effect once the run's folder
                has a checkpoint of its own.
            progress: Whether to show a progress bar on standard error.

        Returns:
            The last step, or `None` if there was none left to do.

        Raises:
            CheckpointError: As from `Trainer.resume` and `load_state`; the recipe that was saved with the run is then
                left as it is.
            ConfigError: As from the trainer, if the recipe cannot be written, or if a tracker has another run of the
                folder's name.
        """
        sent_to = self._sent_to()
        if self.trainer.resume(accept=accept, rewarm_steps=rewarm_steps) is None and branch_from is not None:
            self.trainer.load_state(branch_from, accept=accept, rewarm_steps=rewarm_steps)
        try:
            with self._trackers(sent_to) as trackers:
                # Not before they are open, as it tells which of them have the run. A recipe that was changed replaces
                # the saved one once the run has gone on with it.
                if not (self.out_dir / RECIPE_FILE).exists():
                    self.recipe.save(self.out_dir)
                hooks = [self._save_recipe_once(), *self.hooks, *trackers]
                return self.trainer.fit(hooks, progress=progress, report=self.recipe.report)
        finally:
            for close in self.on_close:
                close()

    def _sent_to(self) -> Collection[str]:
        """Return the trackers that have the run already; a run of its name in another one is someone else's."""
        began = all((self.out_dir / name).exists() for name in ("metrics.jsonl", RECIPE_FILE))
        return type(self.recipe).load(self.out_dir).trackers if began and self.recipe.trackers else []

    def _trackers(self, sent_to: Collection[str]) -> AbstractContextManager[list[Hook]]:
        done = self.trainer.next_step >= self.recipe.total_steps
        return nullcontext([]) if done else tracker_hooks(self.recipe, self.out_dir, sent_to=sent_to)

    def _save_recipe_once(self) -> Hook:
        first = self.trainer.next_step

        def hook(trainer: Trainer, step: StepMetrics) -> None:
            if step.index == first:
                self.recipe.save(self.out_dir)

        return hook


def build_run(recipe: "Recipe", out_dir: Path, *, progress: bool) -> RecipeRun:
    """Build what a recipe names; see `Recipe.build`."""
    source, held_out = open_training(recipe.data)
    if recipe.evaluate_every is not None and held_out is None and recipe.data.validation is None:
        raise ConfigError(
            "token shards cannot be split into training and validation: give data.validation, or leave "
            "evaluate_every out."
        )
    recipe, tokenizer, validation = _settle(recipe, source, held_out, out_dir, progress)
    model, optimizer = make_model(recipe, resolve_device(recipe.device))
    trainer = Trainer(
        model,
        optimizer,
        make_loader(recipe.data, source, tokenizer, recipe.seq_len),
        trainer_config(recipe, out_dir),
        phases=[make_phase(recipe, phase, tokenizer) for phase in run_phases(recipe)],
        validation=validation,
        tokenizer=tokenizer,
    )
    hooks: list[Hook] = []
    if validation is not None:
        hooks.append(every(recipe.evaluate_every or recipe.total_steps, evaluation(validation)))
    if recipe.samples.every is not None:
        hook = sampling(recipe.samples, tokenizer, max_seq_len=recipe.model.max_seq_len, seed=recipe.seed)
        hooks.append(every(recipe.samples.every, hook))
    on_close: tuple[Callable[[], object], ...] = ()
    if recipe.push is not None:
        from tinygpt.publish import PushQueue

        push = recipe.push
        queue = PushQueue(push.repo, folder=out_dir, private=push.private, license=push.license)
        trainer.on_save, on_close = queue, (queue.close,)
    return RecipeRun(recipe, trainer, tuple(hooks), validation, out_dir, on_close)


def check_inputs(recipe: "Recipe", out_dir: Path) -> None:
    """Look for what a recipe needs; see `Recipe.check`."""
    if recipe.push is not None:
        from tinygpt.publish._card import check_license

        check_repo_id(recipe.push.repo)
        check_license(recipe.push.license)
    if recipe.matmul_precision is not None:
        _check_products(recipe, recipe.matmul_precision)
    for name in recipe.trackers:
        check_tracker(name, out_dir.resolve().name)
    data = recipe.data
    source, held_out = open_training(data)
    for phase in recipe.phases:
        if phase.train is not None:
            open_training(data, phase.train)
    if (out_dir / "run.json").exists():
        return  # what it is measured on is in its folder
    measured = open_validation(data, held_out)
    for documents in (source, measured):
        if documents is not None and not isinstance(documents, TokenShards | ValidationSet):
            next(iter(documents.read()))


def _check_products(recipe: "Recipe", precision: MatmulPrecision) -> None:
    """Refuse products that the model's widths or the device do not allow; a single layer is tried on the device."""
    with torch.device("meta"):
        set_matmul_precision(GPT.from_config(recipe.model), precision)
    set_matmul_precision(Linear(32, 32).to(resolve_device(recipe.device)), precision)


def _settle(
    recipe: "Recipe", source: Source, held_out: DocumentSource | None, out_dir: Path, progress: bool
) -> tuple["Recipe", Tokenizer, ValidationSet | None]:
    """Return what the run keeps in its folder and goes on with: the first time it is made, from then on it is read.

    The folder is claimed between making and saving, so that a first attempt that fails claims nothing.
    """
    tokenizer_folder, validation_file = out_dir / "tokenizer", out_dir / "validation.safetensors"
    data = recipe.data
    # What the trainer does not compare; all else is its business.
    identity = {
        "seed": recipe.seed,
        "tokenizer": recipe.tokenizer.replace(folder=absolute(recipe.tokenizer.folder)).model_dump(),
        "validation": [absolute(data.validation), data.held_out, data.validation_tokens],
    }
    claimed = (out_dir / "run.json").exists()
    if claimed:
        claim_run_folder(out_dir, identity)
    there = claimed and (tokenizer_folder / "tokenizer_config.json").exists()
    if there:
        tokenizer = load_tokenizer(tokenizer_folder)
    else:
        tokenizer = make_tokenizer(recipe.tokenizer, source, progress=progress)
    recipe = recipe.resolved(tokenizer.vocab_size)
    validation: ValidationSet | None
    if claimed and validation_file.exists():
        validation = ValidationSet.load(validation_file, rows=data.rows)
    else:
        validation = make_validation(data, held_out, tokenizer, recipe.seq_len)
    claim_run_folder(out_dir, identity)
    if not there:
        tokenizer.save(tokenizer_folder)
    if validation is not None and not validation_file.exists():
        validation.save(validation_file)
    return recipe, tokenizer, validation


def resolve_device(name: str) -> torch.device:
    """Return the device that a recipe or a command means.

    Args:
        name: `"auto"` for a GPU if there is one, or what torch calls a device.

    Raises:
        ConfigError: If it is none, or is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        if reason.startswith("Expected one of"):  # more than twenty names, most of which nobody has
            reason = "it is none that torch knows"
        elif reason.startswith("Could not run"):  # with all it can run on, in some thousand letters
            reason = "this torch has no such device"
        raise ConfigError(f"device={name!r} cannot be used: {reason}; give auto, cpu, cuda, cuda:1 or mps.") from None
    return device


def make_model(recipe: "Recipe", device: torch.device) -> tuple[GPT, MuonAdamW]:
    """Return model and optimizer; of a recipe's seed the weights are always the same."""
    torch.manual_seed(recipe.seed)
    model = GPT.from_config(recipe.model).to(device)
    if recipe.precision == "bfloat16" or resolve_precision(recipe.precision, device) == torch.bfloat16:
        model.set_compute_dtype(torch.bfloat16, embeddings=True)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    assert isinstance(model.head, LMHead)
    model.head.chunk_tokens = recipe.loss_chunk_tokens
    return model, MuonAdamW(param_groups(model, optimizer_rules(recipe)), compile="auto" if recipe.compile else False)


def optimizer_rules(recipe: "Recipe") -> list[Rule]:
    """Return the rules of the optimizer's groups, scaled to the batch of the run."""
    section = recipe.optimizer
    scale = lr_factor(recipe.step_tokens) if section.lr_scale is None else section.lr_scale
    return nanochat_rules(
        model_dim=recipe.model.dim,
        batch_lr_scale=scale,
        weight_decay=section.weight_decay * scale,
        **section.model_dump(exclude={"lr_scale", "weight_decay"}),
    )


def trainer_config(recipe: "Recipe", out_dir: Path | None) -> TrainerConfig:
    """Return the settings of the loop."""
    return TrainerConfig(
        num_steps=recipe.total_steps,
        batch_tokens=recipe.batch_tokens,
        precision=recipe.precision,
        grad_clip=recipe.grad_clip,
        out_dir=None if out_dir is None else str(out_dir),
        save_every=None if out_dir is None else recipe.save_every,
        keep_last=recipe.keep_last,
        keep_every=recipe.keep_every,
        keep_best=recipe.keep_best,
        compile=recipe.compile,
        matmul_precision=recipe.matmul_precision,
        micro_batch_rows=recipe.micro_batch_rows,
        activation_checkpointing=recipe.activation_checkpointing,
    )


def run_phases(recipe: "Recipe") -> list[PhaseRecipe]:
    """Return the phases, one for a run that names none."""
    return recipe.phases or [PhaseRecipe(steps=recipe.total_steps)]


def make_phase(recipe: "Recipe", phase: PhaseRecipe, tokenizer: Tokenizer | None) -> Phase:
    """Return a phase of the trainer; without a tokenizer no data is opened for it."""
    loader = None
    if phase.train is not None and tokenizer is not None:
        source, _ = open_training(recipe.data, phase.train)
        loader = make_loader(recipe.data, source, tokenizer, recipe.seq_len)
    return Phase(
        phase.steps,
        _schedules(recipe, phase),
        name=phase.name,
        loader=loader,
        batch_tokens=phase.batch_tokens,
        accept=phase.accept,
    )


def _schedules(recipe: "Recipe", phase: PhaseRecipe) -> dict[str, Schedule]:
    """Return the schedules of a phase by the names that the trainer has for them."""
    names = {"lr": "lr", "momentum": "muon.momentum", "weight_decay": "muon.weight_decay"}
    chosen = {name: getattr(phase, name) or getattr(recipe.schedules, name) for name in names}
    return {names[name]: schedule.build(recipe.total_steps) for name, schedule in chosen.items()}


def evaluation(validation: ValidationSet) -> Hook:
    """Return a hook that measures bits per byte and records it."""

    def hook(trainer: Trainer, step: StepMetrics) -> None:
        report = evaluate_bpb(trainer.model, validation, micro_batch_rows=trainer.micro_batch_rows)
        trainer.record("evaluation", bpb=report.bpb, loss=report.loss, data_hash=report.data_hash)
        logger.info("step %s: validation %s", f"{step.index + 1:,}", report)

    return hook


def sampling(section: SamplesRecipe, tokenizer: Tokenizer, *, max_seq_len: int, seed: int) -> Hook:
    """Return a hook that lets the model continue the prompts and records what it writes.

    Raises:
        ConfigError: If a prompt leaves no room in the model's context; not hours later, at the first sample.
    """
    rooms = [max_seq_len - 1 - len(tokenizer.encode(prompt)) for prompt in section.prompts]  # <|bos|> comes first
    if min(rooms, default=1) < 1:
        prompt = section.prompts[rooms.index(min(rooms))]
        raise ConfigError(
            f"samples.prompts: {prompt[:40]!r} takes {max_seq_len - min(rooms)} tokens with <|bos|>, and the model's "
            f"context has {max_seq_len}; shorten it."
        )

    def hook(trainer: Trainer, step: StepMetrics) -> None:
        model = trainer.model
        assert isinstance(model, GPT)
        for prompt, room in zip(section.prompts, rooms, strict=True):
            pieces = stream_text(
                model,
                tokenizer,
                prompt,
                max_new_tokens=min(section.max_new_tokens, room),
                temperature=section.temperature,
                seed=seed,
            )
            text = "".join(pieces)
            trainer.record("sample", prompt=prompt, text=text)
            logger.info("step %s: %s%s", f"{step.index + 1:,}", prompt, text)

    return hook
