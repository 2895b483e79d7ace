"""The training loop."""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinygpt import metrics
from tinygpt.checkpoint import checkpoint_folder, latest_checkpoint, list_checkpoints, remove_old_checkpoints
from tinygpt.data import Batch
from tinygpt.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from tinygpt.losses import LossFunction, LossSum, next_token_loss
from tinygpt.metrics import MetricsFile, StepMetrics, Stopwatch
from tinygpt.schedules import Schedule
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer import _state
from tinygpt.trainer._arguments import check_arguments
from tinygpt.trainer._batches import find_non_finite, read_micro_batches, to_device
from tinygpt.trainer._changes import Change, checked_accept
from tinygpt.trainer._config import TrainerConfig, multiplies_bfloat16_fast, resolve_precision
from tinygpt.trainer._hooks import Hook
from tinygpt.trainer._progress import progress_bar
from tinygpt.trainer._rates import Rates
from tinygpt.trainer._signals import interruption, stop_on_signal


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
        loss_fn: Called as `loss_fn(model, batch)`; returns a sum and a count.
        tokenizer: Saved into checkpoints, so that `from_pretrained` users can encode; `None` takes the loader's.
        on_save: Called with the folder of each checkpoint once it is written, to publish it for example.

    Raises:
        ConfigError: If settings do not fit together.

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
        loss_fn: LossFunction = next_token_loss,
        tokenizer: Tokenizer | None = None,
        on_save: Callable[[Path], None] | None = None,
    ) -> None:
        check_arguments(model, optimizer, loader, config, tokenizer)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.model = model
        self.optimizer = optimizer
        self.loader = loader
        self.config = config
        self.loss_fn = loss_fn
        self.tokenizer = tokenizer or getattr(loader, "tokenizer", None)
        self.on_save = on_save
        self.device = next(model.parameters()).device
        self.next_step = 0
        self.tokens = 0
        self.rates = Rates(optimizer, schedules or {})
        self.precision = _set_precision(model, config.precision, self.device)
        if config.compile:
            for block in getattr(model, "blocks", [model]):
                block.compile(dynamic=False)
        self._batches = iter(loader)
        self._watch = Stopwatch()
        self._peak_flops = metrics.peak_flops(self.device, self.precision)
        self._flops: dict[int, int | None] = {}
        self._metrics_file: MetricsFile | None = None
        self._last_saved: Path | None = None

    @property
    def step_tokens(self) -> int | None:
        """Tokens of one step, as far as config and loader tell."""
        rows, seq_len = (getattr(self.loader, name, None) for name in ("rows", "seq_len"))
        return self.config.batch_tokens or (rows * seq_len if rows and seq_len else None)

    @property
    def elapsed_seconds(self) -> float:
        """Training time of the run so far, evaluation and saving not included."""
        return self._watch.elapsed

    @property
    def checkpoint_dir(self) -> Path | None:
        """Folder of the checkpoints, inside `out_dir`."""
        return None if self.config.out_dir is None else Path(self.config.out_dir) / "checkpoints"

    def __iter__(self) -> Iterator[StepMetrics]:
        """Train from `next_step` to the end and yield after each step.

        Raises:
            ConfigError: If `out_dir` holds another run's checkpoints, or batches do not make up `batch_tokens`.
            DataError: If the loader ends or a step has no target.
            NonFiniteError: If a loss or gradient is not finite; weights and optimizer are as before that step.
            CheckpointError: If a checkpoint cannot be written.
            Interrupted: After SIGINT or SIGTERM, once the state is saved; at an interactive prompt a KeyboardInterrupt.
        """
        return self._run()

    def _run(self) -> Generator[StepMetrics, None, None]:
        output = self._open_output()
        with stop_on_signal() as request:
            while self.next_step < self.config.num_steps:
                step = self._train_step()
                if output is not None:
                    output.write_step(step)
                try:
                    yield step
                finally:  # also when the caller leaves the loop, or an evaluation in it fails
                    self._save_if_due(stopping=request.signal_number is not None)
                    if request.signal_number is not None:
                        self._report_stop()
                if request.signal_number is not None:
                    raise interruption(request.signal_number)

    def fit(self, hooks: Sequence[Hook] | Hook = (), *, progress: bool = True) -> StepMetrics | None:
        """Train to the end, calling each hook as `hook(trainer, step)` after every step.

        Args:
            hooks: A function or several; `every(250, function)` makes one that is called now and then.
            progress: Whether to show a progress bar on standard error.

        Returns:
            The last step, or `None` if there was none left to do.
        """
        step = None
        hooks = [hooks] if callable(hooks) else hooks
        with progress_bar(self, enabled=progress) as show, contextlib.closing(self._run()) as steps:
            for step in steps:
                show(step)
                for hook in hooks:
                    hook(self, step)
        return step

    def record(self, event: str, **fields: Any) -> None:
        """Write a line of your own, such as an evaluation, to `metrics.jsonl` under the last finished step."""
        if output := self._open_output():
            output.write(event, self.next_step - 1, **fields)

    def save_state(self, folder: str | Path | None = None) -> Path:
        """Write a checkpoint of everything that a bit-for-bit continuation needs.

        Args:
            folder: Where; `None` for `checkpoints/step-NNNNNN` in `out_dir`.

        Returns:
            The folder.

        Raises:
            ConfigError: If there is neither a folder nor an `out_dir`.
            CheckpointError: If it cannot be written.
            NonFiniteError: If a weight is not finite: such a checkpoint could only mislead.
        """
        if folder is None:
            if self.checkpoint_dir is None:
                raise ConfigError("save_state needs a folder, or a TrainerConfig with out_dir.")
            folder = checkpoint_folder(self.checkpoint_dir, self.next_step)
        with torch.no_grad():
            if not math.isfinite(torch.nn.utils.get_total_norm(list(self.model.parameters()))):
                raise NonFiniteError(f"weights are not finite after step {self.next_step - 1}, so they are not saved.")
        self._last_saved = _state.save(self, Path(folder))
        if self.on_save is not None:
            self.on_save(self._last_saved)
        return self._last_saved

    def load_state(self, folder: str | Path, *, accept: Collection[str] | str = ()) -> list[Change]:
        """Continue from a checkpoint, after comparing its run with this one.

        Rates of the next step, model, data, tokenizer and batch are compared before anything is loaded. A jump in
        learning rate, weight decay or momentum, another model config or other data is refused unless accepted.

        Args:
            folder: A checkpoint folder.
            accept: Which differences to go on with: `"schedule"`, `"model"`, `"data"`.

        Returns:
            All differences, harmless ones included; `tinygpt.trainer.format_changes` makes a table of them.

        Raises:
            CheckpointError: If the checkpoint is damaged or does not fit, or a difference was not accepted.
        """
        accept = checked_accept(accept)
        folder = Path(folder)
        if self.checkpoint_dir is not None:
            later = [path for path in list_checkpoints(self.checkpoint_dir) if path.name > folder.name]
            if later and folder.parent.resolve() == self.checkpoint_dir.resolve():
                raise CheckpointError(
                    f"{self.checkpoint_dir} goes on after {folder.name}, up to {later[-1].name}: "
                    "to branch from an earlier step choose another out_dir; to go on use trainer.resume()."
                )
        changes = _state.load(self, folder, accept)
        self._last_saved = folder
        self._metrics_file = None
        if output := self._open_output():
            rows = [[c.name, c.was, c.will_be] for c in changes]
            output.write("resume", self.next_step - 1, checkpoint=str(folder), changes=rows)
        return changes

    def resume(self, *, accept: Collection[str] | str = ()) -> list[Change] | None:
        """Continue from the newest whole checkpoint in `out_dir`; return `None` if there is none, else as `load_state`.

        Newer ones that are damaged are moved out of the way, as `damaged-step-NNNNNN`, with a warning.

        Raises:
            CheckpointError: As in `load_state`, or if there are checkpoints and none is whole.
            ConfigError: If the `TrainerConfig` has no `out_dir`.
        """
        if self.checkpoint_dir is None:
            raise ConfigError("resume looks into the out_dir of the TrainerConfig, and there is none.")
        if not self.checkpoint_dir.exists():
            return None
        folder = latest_checkpoint(self.checkpoint_dir)
        found = list_checkpoints(self.checkpoint_dir)
        if folder is None and found:
            raise CheckpointError(
                f"no checkpoint in {self.checkpoint_dir} is whole; choose another out_dir to start over."
            )
        if folder is None:
            return None
        for damaged in found[found.index(folder) + 1 :]:
            damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
        return self.load_state(folder, accept=accept)

    def set_progress(self, next_step: int, tokens: int, elapsed_seconds: float) -> None:
        """Set where the run stands; `load_state` does so, and nobody else needs to."""
        self.next_step, self.tokens = next_step, tokens
        self._watch = Stopwatch(elapsed_seconds)
        self._batches = iter(self.loader)

    def _train_step(self) -> StepMetrics:
        self._watch.start()
        lead = self.rates.apply(self.next_step)
        self.model.train()
        self.model.zero_grad()  # whatever a failed step or the user's own backward left there
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        batches: list[Batch] = []
        expected = 0
        for batch in read_micro_batches(self._batches, self.config.batch_tokens, self.next_step):
            expected = self.config.batch_tokens or batch.targets.numel()
            batches.append(batch)
            loss = self.loss_fn(self.model, to_device(batch, self.device))
            if not isinstance(loss, LossSum):
                raise ConfigError(f"loss_fn returned a {type(loss).__name__}; return LossSum(sum, count), not a mean.")
            # Divided by the number of positions here and by the number of targets below where they differ: one
            # global count over all micro-batches, without waiting for the device to count.
            (loss.total / expected).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.total.detach().float())
            counts.append(loss.count)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).float()
        # The only wait for the device in a step: all numbers in one transfer. float32 counts exactly to 16.7 million.
        numbers = torch.stack([*losses, *(count.float() for count in counts), norm]).tolist()
        totals, count = numbers[: len(batches)], sum(numbers[len(batches) : -1])
        if count == 0:
            self.optimizer.zero_grad()
            raise DataError(f"step {self.next_step} has no target to train on: all of its batches are masked.")
        mean, grad_norm = sum(totals) / count, numbers[-1] * expected / count
        if not (math.isfinite(mean) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            where = find_non_finite(self.model, self.loss_fn, batches, totals, self.device)
            raise NonFiniteError(
                f"step {self.next_step}: "
                + (
                    f"the loss is not finite in {where}"
                    if where
                    else f"losses are finite, the gradient norm is {grad_norm}"
                )
                + f". The weights were not changed. Last good checkpoint: {self._last_saved or 'none was saved'}. "
                "Lower the learning rate, set grad_clip, or look at those rows."
            )
        factor = expected / count
        if self.config.grad_clip is not None and grad_norm > self.config.grad_clip:
            factor *= self.config.grad_clip / grad_norm
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += expected
        self.next_step += 1
        seconds = self._watch.stop()
        speed = expected / seconds
        flops = self._flops_per_token(batches[0].inputs.shape[1])
        mfu = None if flops is None or not self._peak_flops else speed * flops / self._peak_flops
        return StepMetrics(
            index=self.next_step - 1,
            loss=mean,
            grad_norm=grad_norm,
            lr=float(lead["lr"]),
            weight_decay=float(lead.get("weight_decay", 0.0)),
            momentum=lead.get("momentum"),
            tokens=self.tokens,
            epoch=getattr(self.loader, "epoch", None),
            tokens_per_second=speed,
            mfu=mfu,
            peak_memory_bytes=metrics.peak_memory_bytes(self.device),
            elapsed_seconds=self._watch.elapsed,
        )

    def _flops_per_token(self, seq_len: int) -> int | None:
        if seq_len not in self._flops:
            count = getattr(self.model, "flops_per_token", None)
            self._flops[seq_len] = None if count is None else count(seq_len)
        return self._flops[seq_len]

    def _save_if_due(self, *, stopping: bool) -> None:
        if self.config.out_dir is None or self.checkpoint_dir is None:
            return
        every = self.config.save_every
        due = self.next_step == self.config.num_steps or (every is not None and self.next_step % every == 0)
        there = checkpoint_folder(self.checkpoint_dir, self.next_step)
        if (due or stopping) and self._last_saved != there:
            self.save_state()
            if self.config.keep_last is not None:
                remove_old_checkpoints(self.checkpoint_dir, keep_last=self.config.keep_last, keep=there)

    def _report_stop(self) -> None:
        if self.next_step == self.config.num_steps:
            text = "that was the last one, training is complete"
        elif self.config.out_dir is None:
            text = "nothing was saved, since the TrainerConfig has no out_dir"
        else:
            text = f"the state is saved in {self._last_saved}; to go on, run the same program with trainer.resume()"
        sys.stderr.write(f"\nstopped after step {self.next_step - 1}: {text}.\n")
        sys.stderr.flush()

    def _open_output(self) -> MetricsFile | None:
        if self.config.out_dir is None or self._metrics_file is not None:
            return self._metrics_file
        if self.next_step == 0 and self.checkpoint_dir is not None and (found := list_checkpoints(self.checkpoint_dir)):
            raise ConfigError(
                f"{self.config.out_dir} already holds a run, saved up to {found[-1].name}: "
                "continue it with trainer.resume(), or choose another out_dir."
            )
        try:
            self._metrics_file = MetricsFile(Path(self.config.out_dir) / "metrics.jsonl", next_step=self.next_step)
        except OSError as error:
            raise ConfigError(f"out_dir={str(self.config.out_dir)!r} cannot be written: {error}.") from None
        return self._metrics_file


def _set_precision(model: nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """Give the model its compute dtype and return it."""
    setter = getattr(model, "set_compute_dtype", None)
    chosen = getattr(model, "compute_dtype", None)
    dtype = chosen if precision == "auto" and chosen is not None else resolve_precision(precision, device)
    if setter is not None:
        # Nothing to set for float32 on its own: the model then follows its embedding, also on another device later.
        setter(None if precision == "auto" and dtype == torch.float32 else dtype)
    elif precision == "bfloat16":
        raise ConfigError(
            "precision='bfloat16' needs a model with set_compute_dtype(), as GPT has; "
            "for another model use torch.autocast inside loss_fn and precision='auto'."
        )
    else:
        dtype = next(model.parameters()).dtype
    if dtype == torch.bfloat16 and not multiplies_bfloat16_fast(device):
        warnings.warn(f"bfloat16 products are slow on this {device.type} device; float32 is faster.", stacklevel=3)
    return dtype
