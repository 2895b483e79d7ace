"""The training loop."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tinygpt.checkpoint import RunLock, checkpoint_folder, mark_latest
from tinygpt.data import Batch, ValidationSet
from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.losses import LossFunction, next_token_loss
from tinygpt.metrics import MetricsFile, StepMetrics, Stopwatch
from tinygpt.schedules import Schedule
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer._arguments import check_arguments
from tinygpt.trainer._changes import Change, as_rows, checked_accept
from tinygpt.trainer._config import TrainerConfig
from tinygpt.trainer._hooks import Hook
from tinygpt.trainer._identity import MeasuredOn
from tinygpt.trainer._meter import Meter
from tinygpt.trainer._output import open_output
from tinygpt.trainer._phases import Course, Phase
from tinygpt.trainer._plan import check_boundaries, describe_plan, enter_phase
from tinygpt.trainer._precision import set_precision
from tinygpt.trainer._progress import progress_bar
from tinygpt.trainer._rates import Rates
from tinygpt.trainer._resume import load, newest_whole, refuse_going_back, resume_as_asked
from tinygpt.trainer._saving import Save, Saver, checked_evaluation, close_at_exit, tidier
from tinygpt.trainer._signals import interruption, report_stop, stop_on_signal
from tinygpt.trainer._state import capture
from tinygpt.trainer._step import train_step


class Trainer:
    """Trains a model; iterate over it for one `StepMetrics` a step, or call `fit`.

    A step reads its micro-batches, adds up their gradients over the global count of targets, checks that loss and
    gradient are finite, and only then lets the optimizer change the weights. SIGINT and SIGTERM end the program after
    the running step, its state saved; a second signal ends it at once.

    Args:
        model: Any module, on the device to train on.
        optimizer: Any torch optimizer over its parameters.
        loader: Endless iterator of `Batch`; a `BatchLoader` can be resumed exactly.
        config: Length, precision and output of the run.
        schedules: Functions of the step, counted from 0, by option: `"lr"` and `"weight_decay"` multiply what each
            group was made with, others such as `"momentum"` set the value. `"muon.weight_decay"` applies to groups
            of that kind alone.
        phases: Instead of `schedules`: the parts of the run in order, whose steps add up to `config.num_steps`. At
            each boundary a checkpoint is saved that no retention removes.
        validation: What the run is measured on. Only its hash is kept: going on with another set is refused.
        loss_fn: Called as `loss_fn(model, batch)`; returns a sum and a count.
        tokenizer: Saved into checkpoints, so that `from_pretrained` users can encode; `None` takes the loader's.
        on_save: Called with the folder of each checkpoint once it is complete on disk, to publish it for example; by
            the thread that trains, between two steps.

    Attributes:
        evaluations: What `record("evaluation", bpb=...)` was given, by step; saved and resumed.
        protected_steps: Checkpoints of these steps are never deleted; add to it at will.

    Raises:
        ConfigError: If settings do not fit together, or rates jump between two phases.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
        from tinygpt.data import BatchLoader, embedded_corpus
        from tinygpt.optim import MuonAdamW
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=64))
        loader = BatchLoader(embedded_corpus(), ByteTokenizer(), rows=2, seq_len=64, overflow="carry")
        trainer = Trainer(model, MuonAdamW.for_model(model), loader, TrainerConfig(num_steps=2))
        losses = [step.loss for step in trainer]
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Iterable[Batch],
        config: TrainerConfig,
        *,
        schedules: Mapping[str, Schedule] | None = None,
        phases: Sequence[Phase] | None = None,
        validation: ValidationSet | None = None,
        loss_fn: LossFunction = next_token_loss,
        tokenizer: Tokenizer | None = None,
        on_save: Callable[[Path], None] | None = None,
    ) -> None:
        check_arguments(model, optimizer, loader, config, tokenizer, phases)
        if phases is not None and schedules is not None:
            raise ConfigError("phases bring their own schedules; give either phases or schedules.")
        phases = [Phase(config.num_steps, schedules or {})] if phases is None else phases
        self.model = model
        self.optimizer = optimizer
        self.course = Course(phases, loader, config.batch_tokens)
        self.measured_on = MeasuredOn(validation)
        self.protected_steps: set[int] = set(self.course.boundaries)
        self.config = config
        self.loss_fn = loss_fn
        self.tokenizer = tokenizer or getattr(loader, "tokenizer", None)
        self.on_save = on_save
        self.device = next(model.parameters()).device
        self.next_step = 0
        self.tokens = 0
        self.rates = Rates(optimizer, [phase.schedules for phase in phases], self.course.starts)
        check_boundaries(self.course, self.rates)
        self.precision = set_precision(model, config.precision, self.device)
        if config.compile:
            for block in getattr(model, "blocks", [model]):
                block.compile(dynamic=False)
        self._meter = Meter(model, self.device, self.precision)
        self._metrics_file: MetricsFile | None = None
        self._last_saved: Path | None = None
        self.evaluations: list[dict[str, Any]] = []
        self._saver = Saver(self._report_save)
        self._lock: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if config.out_dir is None else RunLock(config.out_dir)
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the run; a run made with `schedules` is one phase."""
        return self.course.phases

    @property
    def loader(self) -> Any:
        """What the next step reads from."""
        return self.course.loaders[self.course.index_at(self.next_step)]

    @loader.setter
    def loader(self, loader: Iterable[Batch]) -> None:
        self.course.replace_loader(self.course.index_at(self.next_step), loader)

    @property
    def step_tokens(self) -> int | None:
        """Tokens of the next step, as far as settings and loader tell."""
        return self.course.step_tokens(self.course.index_at(self.next_step))

    @property
    def elapsed_seconds(self) -> float:
        """Training time of the run so far, evaluation and saving not included."""
        return self._meter.watch.elapsed

    @property
    def stall_seconds(self) -> float:
        """How long training stood still for checkpoints since this trainer was made."""
        return self._saver.stall_seconds

    @property
    def checkpoint_dir(self) -> Path | None:
        """Folder of the checkpoints, inside `out_dir`."""
        return None if self.config.out_dir is None else Path(self.config.out_dir) / "checkpoints"

    def __iter__(self) -> Iterator[StepMetrics]:
        """Train from `next_step` to the end and yield after each step.

        Raises:
            ConfigError: If `out_dir` holds another run's checkpoints or cannot be written, or batches do not make up
                `batch_tokens`.
            DataError: If the loader ends or a step has no target.
            NonFiniteError: If a loss or gradient is not finite; weights and optimizer are as before that step.
            CheckpointError: If a checkpoint cannot be written; one written in the background is reported between two
                later steps. What was saved before stays, and the loop can be entered again. Also if another process
                uses `out_dir`.
            Interrupted: After SIGINT or SIGTERM, once the state is saved; at an interactive prompt a KeyboardInterrupt.
        """
        steps = self._run()
        close_at_exit(steps)
        return steps

    def _run(self) -> Generator[StepMetrics, None, None]:
        with self._lock, stop_on_signal() as request:
            output = self._open_output()
            try:
                while self.next_step < self.config.num_steps:
                    self._saver.poll()
                    if self.next_step in self.course.boundaries:
                        enter_phase(self, output)
                    step = self._train_step()
                    if output is not None:
                        output.write_step(step)
                    left = True
                    try:
                        yield step
                        left = False
                    finally:  # also when the caller leaves the loop, or an evaluation in it fails
                        self._save_if_due(stopping=request.signal_number is not None, left=left)
                        if request.signal_number is not None:
                            report_stop(self, self._last_saved)
                    if request.signal_number is not None:
                        raise interruption(request.signal_number)
            except BaseException as error:
                self._saver.settle()
                if isinstance(error, NonFiniteError) and output is not None:
                    output.write("stop", self.next_step, reason=str(error))
                raise
            self._saver.wait()

    def fit(
        self,
        hooks: Sequence[Hook] | Hook = (),
        *,
        progress: bool = True,
        resume: str | Path | None = None,
        accept: Collection[str] | str = (),
        rewarm_steps: int | None = None,
    ) -> StepMetrics | None:
        """Train to the end, calling each hook as `hook(trainer, step)` after every step.

        Args:
            hooks: A function or several; `every(250, function)` makes one that is called now and then.
            progress: Whether to show a progress bar on standard error.
            resume: `"auto"` calls `resume` first, unless this object has trained already; a checkpoint folder calls
                `load_state`.
            accept: For either of these.
            rewarm_steps: For either of these.

        Returns:
            The last step, or `None` if there was none left to do.

        Raises:
            ConfigError: If `accept` or `rewarm_steps` is given without `resume`; and as from iteration.
            CheckpointError: As in `resume` and `load_state`.
        """
        resume_as_asked(self, resume, accept, rewarm_steps)
        step = None
        hooks = [hooks] if callable(hooks) else hooks
        with progress_bar(self, enabled=progress) as show, contextlib.closing(self._run()) as steps:
            for step in steps:
                show(step)
                for hook in hooks:
                    hook(self, step)
        return step

    def record(self, event: str, **fields: Any) -> None:
        """Write a line of your own to `metrics.jsonl` under the last finished step.

        The `bpb` and `data_hash` of an `"evaluation"` are kept in checkpoints as well: `keep_best` ranks by them.

        Raises:
            ConfigError: If an evaluation's `bpb` is not a number, or `out_dir` cannot be written.
            CheckpointError: If another process uses `out_dir`; or if the `data_hash` of an evaluation is not that of
                the evaluations before: a run never mixes two validation sets unseen.
        """
        if event == "evaluation":
            self.measured_on.check(fields.get("data_hash"))
            if evaluation := checked_evaluation(self.next_step, fields):
                self.evaluations = [e for e in self.evaluations if e["step"] != self.next_step] + [evaluation]
        with self._lock:
            if output := self._open_output():
                output.write(event, self.next_step - 1, **fields)

    def save_state(self, folder: str | Path | None = None) -> Path:
        """Write a checkpoint of everything that a bit-for-bit continuation needs, and return when it is complete.

        Args:
            folder: Where; `None` for `checkpoints/step-NNNNNN` in `out_dir`.

        Returns:
            The folder.

        Raises:
            ConfigError: If there is neither a folder nor an `out_dir`.
            CheckpointError: If it cannot be written, or another process uses `out_dir`.
            NonFiniteError: If a weight is not finite: such a checkpoint could only mislead.
        """
        if folder is None:
            if self.checkpoint_dir is None:
                raise ConfigError("save_state needs a folder, or a TrainerConfig with out_dir.")
            folder = checkpoint_folder(self.checkpoint_dir, self.next_step)
        folder = Path(folder)
        with self._lock:
            self._save(folder, tidy=lambda: mark_latest(folder) if folder.parent == self.checkpoint_dir else None)
        return folder

    def _save(self, folder: Path, **options: Any) -> None:
        self._saver.save(folder, self.next_step, lambda memory: capture(self, memory), **options)

    def _report_save(self, save: Save) -> None:
        self._last_saved = save.folder
        if self._metrics_file is not None:
            self._metrics_file.write("save", save.step - 1, **save.record())
        if self.on_save is not None:
            self.on_save(save.folder)

    def load_state(
        self, folder: str | Path, *, accept: Collection[str] | str = (), rewarm_steps: int | None = None
    ) -> list[Change]:
        """Continue from a checkpoint, after comparing its run with this one.

        Everything that shapes training is compared before anything is loaded: rates of the next step, batch, model,
        data and validation set, optimizer groups, precision, versions. A jump in learning rate, weight decay or
        momentum, another model config or other data is refused unless accepted.

        Args:
            folder: A checkpoint folder.
            accept: Which differences to go on with: `"schedule"`, `"model"`, `"data"`. A phase that begins at this
                step brings what it accepts.
            rewarm_steps: Instead of accepting a jump: over so many steps learning rate, weight decay and momentum go
                linearly from the checkpoint's to this run's. Where they do not differ it does nothing.

        Returns:
            All differences, harmless ones included; `tinygpt.trainer.format_changes` makes a table of them.

        Raises:
            CheckpointError: If the checkpoint is damaged or does not fit, or a difference was not accepted; the error
                names the ways to go on.
            ConfigError: If a topic is not known, or `rewarm_steps` is not positive or longer than the rest of the run.
        """
        return self._load(Path(folder), checked_accept(accept), rewarm_steps, verified=False)

    def _load(self, folder: Path, accept: set[str], rewarm_steps: int | None, *, verified: bool) -> list[Change]:
        refuse_going_back(folder, self.checkpoint_dir)
        with self._lock:
            changes = load(self, folder, accept, rewarm_steps, verified=verified)
            self._last_saved = folder
            self._metrics_file = None
            if output := self._open_output():
                output.write("resume", self.next_step - 1, checkpoint=str(folder), changes=as_rows(changes))
        return changes

    def resume(self, *, accept: Collection[str] | str = (), rewarm_steps: int | None = None) -> list[Change] | None:
        """Continue from the newest whole checkpoint in `out_dir`; return `None` if there is none, else as `load_state`.

        Newer ones that are damaged are moved out of the way, as `damaged-step-NNNNNN`, with a warning.

        Raises:
            CheckpointError: As in `load_state`, or if there are checkpoints and none is whole.
            ConfigError: If the `TrainerConfig` has no `out_dir`.
        """
        accept = checked_accept(accept)
        if self.checkpoint_dir is not None and not self.checkpoint_dir.exists():
            return None
        with self._lock:
            folder = newest_whole(self.checkpoint_dir)
            return None if folder is None else self._load(folder, accept, rewarm_steps, verified=True)

    def set_progress(self, next_step: int, tokens: int, elapsed_seconds: float) -> None:
        """Set where the run stands; `load_state` does so, and nobody else needs to."""
        self.next_step, self.tokens = next_step, tokens
        self._meter.watch = Stopwatch(elapsed_seconds)
        self.course.restart_loaders()

    def plan(self) -> str:
        """Return what the run is going to do as text: phases, steps, tokens, rates, and what changes in between."""
        return describe_plan(self)

    def _train_step(self) -> StepMetrics:
        self._meter.watch.start()
        lead = self.rates.apply(self.next_step)
        loader = self.loader
        result = train_step(
            self.model,
            self.optimizer,
            self.loss_fn,
            self.course.batches_at(self.next_step),
            index=self.next_step,
            batch_tokens=self.course.batch_tokens[self.course.index_at(self.next_step)],
            grad_clip=self.config.grad_clip,
            last_saved=self._last_good,
        )
        self.tokens += result.tokens
        self.next_step += 1
        epoch = getattr(loader, "epoch", None)
        return self._meter.measure(self.next_step - 1, result, lead, tokens=self.tokens, epoch=epoch)

    def _last_good(self) -> Path | None:
        self._saver.settle()
        return self._last_saved

    def _save_if_due(self, *, stopping: bool, left: bool) -> None:
        if self.config.out_dir is None or self.checkpoint_dir is None:
            return
        every = self.config.save_every
        due = self.next_step == self.config.num_steps or (every is not None and self.next_step % every == 0)
        due = due or self.next_step in self.course.boundaries
        there = checkpoint_folder(self.checkpoint_dir, self.next_step)
        if (due or stopping) and self._last_saved != there:
            # The last one is waited for in any case: a copy would only cost, and a program that ends starts no thread.
            last = stopping or left or self.next_step == self.config.num_steps
            tidy = tidier(there, self.config, self.evaluations, self.protected_steps)
            self._save(there, tidy=tidy, background=self.config.save_in_background and not last, left=left)

    def _open_output(self) -> MetricsFile | None:
        if self._metrics_file is None and self.config.out_dir is not None:
            self._metrics_file = open_output(self, self.config.out_dir)
        return self._metrics_file
