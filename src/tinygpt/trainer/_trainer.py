"""The training loop."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tinygpt.checkpoint import mark_latest
from tinygpt.data import Batch, ValidationSet
from tinygpt.errors import NonFiniteError
from tinygpt.losses import LossFunction, next_token_loss
from tinygpt.metrics import MetricsFile, StepMetrics, Stopwatch
from tinygpt.schedules import Schedule
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer._arguments import check_arguments
from tinygpt.trainer._changes import Change, as_rows, checked_accept
from tinygpt.trainer._compile import compile_parts
from tinygpt.trainer._config import TrainerConfig
from tinygpt.trainer._hooks import Hook, checked_hooks
from tinygpt.trainer._identity import MeasuredOn
from tinygpt.trainer._meter import Meter
from tinygpt.trainer._output import is_own, lock_of, next_folder, open_output, refuse_taken_folder, was_announced
from tinygpt.trainer._phases import Course, Phase
from tinygpt.trainer._plan import check_boundaries, describe_plan, enter_phase
from tinygpt.trainer._precision import prepare_model
from tinygpt.trainer._progress import progress_bar
from tinygpt.trainer._rates import Rates
from tinygpt.trainer._report import report_run
from tinygpt.trainer._resume import load, newest_whole, refuse_another_course, resume_as_asked
from tinygpt.trainer._retention import due_checkpoint, may_go_on_meanwhile, tidier, with_evaluation
from tinygpt.trainer._rows import rows_of
from tinygpt.trainer._saving import Save, Saver, close_at_exit
from tinygpt.trainer._signals import interruption, report_stop, stop_on_signal
from tinygpt.trainer._state import capture
from tinygpt.trainer._step import Update, train_step


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
            the thread that trains, between two steps. For one that was written when the process was killed, by the
            resume; it may then be called a second time, never not at all.

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
        check_arguments(model, optimizer, loader, config, tokenizer, loss_fn, on_save, phases, schedules)
        phases = [Phase(config.num_steps, schedules or {})] if phases is None else phases
        self.model, self.optimizer = model, optimizer
        self.course = Course(phases, loader, config.batch_tokens)
        self.measured_on = MeasuredOn(validation)
        self.protected_steps: set[int] = set(self.course.boundaries)
        self.config, self.loss_fn = config, loss_fn
        self.tokenizer, self.on_save = tokenizer or getattr(loader, "tokenizer", None), on_save
        self.device = next(model.parameters()).device
        self.next_step, self.tokens = 0, 0
        self.rates = Rates(optimizer, [phase.schedules for phase in phases], self.course.starts)
        check_boundaries(self.course, self.rates)
        self.precision = prepare_model(model, config, self.device)
        self._step_loss = compile_parts(model, loss_fn, config.compile, self.device)
        self.rows = rows_of(self)
        self._meter = Meter(model, self.device, self.precision)
        self._metrics_file: MetricsFile | None = None
        self._last_saved: Path | None = None
        self._unrecorded: StepMetrics | None = None
        self._update, self._saver = Update(optimizer), Saver(self._report_save)
        self.evaluations: list[dict[str, Any]] = []
        self._lock = lock_of(config.out_dir)

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
    def micro_batch_rows(self) -> int | None:
        """Rows that are computed at a time; `None` for all, or before `"auto"` has chosen."""
        return self.rows.rows

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
            ConfigError: If `out_dir` holds another run or cannot be written, or batches do not make up `batch_tokens`.
            DataError: If the loader ends or a step has no target.
            NonFiniteError: If a loss or gradient is not finite; weights and optimizer are as before that step.
            CheckpointError: If a checkpoint cannot be written; one written in the background is reported between two
                later steps. What was saved before stays, and the loop can be entered again: it begins with the
                checkpoint that failed. Also if another process uses `out_dir`, or the weights were left half changed.
            Interrupted: After SIGINT or SIGTERM, once the state is saved; at an interactive prompt a KeyboardInterrupt.
        """
        return close_at_exit(self._run())

    def _run(self) -> Generator[StepMetrics, None, None]:
        with self._lock, stop_on_signal() as request:
            self._update.check()
            self.rows.choose_for(self.loader)
            output = self._open_output()
            try:
                self._saver.wait()
                if self._saver.owed:  # as an error ended the loop before, which the caller has seen to
                    self._save_if_due(stopping=False, left=False)
                while self._unrecorded is not None or self.next_step < self.config.num_steps:
                    self._saver.poll()
                    if self._unrecorded is None:
                        if self.next_step in self.course.boundaries:
                            enter_phase(self, output)
                        self._unrecorded = self._train_step()
                    step = self._unrecorded
                    if output is not None:
                        output.write_step(step)
                    self._unrecorded = None
                    left = True
                    try:
                        yield step
                        left = False
                    finally:  # also if the caller leaves or fails; a signal during the save is left to the next step
                        self._save_if_due(stopping=(signal := request.signal_number) is not None, left=left)
                        if signal is not None:
                            report_stop(self, self._last_saved)
                    if signal is not None:
                        raise interruption(signal)
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
        report: bool = True,
    ) -> StepMetrics | None:
        """Train to the end, calling each hook as `hook(trainer, step)` after every step.

        Args:
            hooks: A function or several; `every(250, function)` makes one that is called now and then.
            progress: Whether to show a progress bar on standard error.
            resume: `"auto"` calls `resume` first, unless this object has trained already; a checkpoint folder calls
                `load_state`.
            accept: For either of these.
            rewarm_steps: For either of these.
            report: Whether to write `report/` into `out_dir` at the end, if there is one, as `write_report` does.

        Returns:
            The last step, or `None` if there was none left to do.

        Raises:
            ConfigError: If `accept` or `rewarm_steps` is given without `resume`; and as from iteration.
            CheckpointError: As in `resume` and `load_state`.
        """
        step, hooks = None, checked_hooks(hooks)
        resume_as_asked(self, resume, accept, rewarm_steps)
        with progress_bar(self, enabled=progress) as show, contextlib.closing(self._run()) as steps:
            for step in steps:
                show(step)
                for hook in hooks:
                    hook(self, step)
        report_run(self.config.out_dir if report else None)
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
            self.evaluations = with_evaluation(self.evaluations, self.next_step, fields)
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
            ConfigError: If there is neither a folder nor an `out_dir`, or another run is there.
            CheckpointError: If it cannot be written, `out_dir` is in use, or the weights were left half changed.
            NonFiniteError: If a weight is not finite: such a checkpoint could only mislead.
        """
        folder = next_folder(self) if folder is None else Path(folder)
        with self._lock:
            if own := is_own(self, folder):
                self._open_output()
            self._save(folder, tidy=partial(mark_latest, folder) if own else None)
        return folder

    def _save(self, folder: Path, **options: Any) -> None:
        self._update.check()
        self._saver.save(folder, self.next_step, lambda memory: capture(self, memory), **options)

    def _report_save(self, save: Save) -> None:
        self._last_saved = save.folder
        if self.on_save is not None:
            self.on_save(save.folder)
        # After it, and not before: a checkpoint that a crash leaves without this line is announced by the resume.
        if self._metrics_file is not None:
            self._metrics_file.write("save", save.step - 1, **save.record())

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
                names the ways to go on. Also if `out_dir` holds a run, and this is not its newest checkpoint.
            ConfigError: If a topic is not known, or `rewarm_steps` is not positive or longer than the rest of the run.
        """
        return self._load(Path(folder), checked_accept(accept), rewarm_steps, verified=False)

    def _load(self, folder: Path, accept: set[str], rewarm_steps: int | None, *, verified: bool) -> list[Change]:
        with self._lock:
            refuse_another_course(folder, self.checkpoint_dir)
            changes = load(self, folder, accept, rewarm_steps, verified=verified)
            self._last_saved, self._metrics_file, self._unrecorded, self._update.torn = folder, None, None, False
            if output := self._open_output():
                output.write("resume", self.next_step - 1, checkpoint=str(folder), changes=as_rows(changes))
                if is_own(self, folder) and not was_announced(output, folder):
                    self._report_save(Save(folder, self.next_step))
        return changes

    def resume(self, *, accept: Collection[str] | str = (), rewarm_steps: int | None = None) -> list[Change] | None:
        """Continue from the newest whole checkpoint in `out_dir`; return `None` if there is none, else as `load_state`.

        Newer ones that are damaged are moved out of the way, as `damaged-step-NNNNNN`, with a warning.

        Raises:
            CheckpointError: As in `load_state`, or if there are checkpoints and none is whole.
            DataError: If `metrics.jsonl` is damaged.
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
        result = train_step(
            self.model,
            self.optimizer,
            self._step_loss,
            self.course.batches_at(self.next_step),
            index=self.next_step,
            batch_tokens=self.course.batch_tokens[self.course.index_at(self.next_step)],
            rows=self.rows,
            grad_clip=self.config.grad_clip,
            update=self._update,
            last_saved=self._last_good,
        )
        epoch = getattr(self.loader, "epoch", None)
        self.next_step, self.tokens = self.next_step + 1, self.tokens + result.tokens
        return self._meter.measure(self.next_step - 1, result, lead, tokens=self.tokens, epoch=epoch)

    def _last_good(self) -> Path | None:
        self._saver.settle()
        return self._last_saved

    def _save_if_due(self, *, stopping: bool, left: bool) -> None:
        there = due_checkpoint(self, asked=stopping or self._saver.owed)
        if there is not None and there == self._last_saved:  # by a save_state() of the caller
            tidier(self, there)()
        elif there is not None:
            background = may_go_on_meanwhile(self, leaving=stopping or left)
            self._save(there, tidy=tidier(self, there), background=background, left=left)

    def _open_output(self) -> MetricsFile | None:
        if self.config.out_dir is not None:
            refuse_taken_folder(self, self._last_saved)
            self._metrics_file = self._metrics_file or open_output(self, self.config.out_dir)
        return self._metrics_file
