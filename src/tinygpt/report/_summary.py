"""The tables of a report: what the run is made of, how the loss went, how fast it was."""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinygpt.report._findings import mean_window
from tinygpt.report._health import settled, step_tokens, time_use
from tinygpt.report._log import Floats, Integers, RunLog, number, objects, section
from tinygpt.report._page import Block, Paragraph, Table
from tinygpt.report._statistics import smooth
from tinygpt.report._text import bytes_text, count_text, finite_text, number_text, seconds_text, short, value_text

_MOST_ROWS = 14
_MOST_PHASES = 30
_MOST_FIELDS = 200
_NO_RECORD = 'The run wrote no record of its model and settings (the event "run" in metrics.jsonl)'


def headline(log: RunLog) -> dict[str, Any]:
    """Return the figures that come first, as numbers."""
    validation = log.validation
    best = min(validation, key=lambda e: e.bpb) if validation else None
    loss = log["loss"][np.isfinite(log["loss"])]
    mask = settled(log)
    seconds = step_tokens(log)[mask] / log["tokens_per_second"][mask]
    use = time_use(log)
    memory = log["peak_memory_bytes"]
    parameters = number(section(log.record, "model").get("num_parameters"))
    mfu = log["mfu"][mask & np.isfinite(log["mfu"])]
    return {
        "status": log.status(),
        "steps": log.last_step,
        "num_steps": log.num_steps,
        "tokens": float(log["tokens"][-1]) if len(log["tokens"]) else math.nan,
        "train_loss": float(loss[-mean_window(log) :].mean()) if len(loss) else math.nan,
        "validation_bpb": validation[-1].bpb if validation else math.nan,
        "best_validation_bpb": best.bpb if best else math.nan,
        "best_validation_step": best.step if best else None,
        "tokens_per_second": float(np.median(log["tokens_per_second"][mask])) if mask.any() else math.nan,
        "step_seconds": float(np.median(seconds)) if mask.any() else math.nan,
        "training_seconds": use.training,
        "evaluation_seconds": use.evaluation,
        "other_seconds": use.other,
        "mfu": float(np.median(mfu)) if len(mfu) else math.nan,
        "peak_memory_bytes": float(np.nanmax(memory)) if np.isfinite(memory).any() else math.nan,
        "checkpoint_bytes": sum(log.checkpoints[-1].sizes.values()) if log.checkpoints else None,
        "num_parameters": int(parameters) if math.isfinite(parameters) else None,
    }


def cards(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the headline as labels and texts."""
    planned = figures["num_steps"]
    steps = f"{figures['steps']:,}" + (f" of {planned:,}" if planned and planned > figures["steps"] else "")
    shown = [
        ("status", figures["status"]),
        ("steps", steps),
        ("tokens", count_text(figures["tokens"])),
        ("validation", finite_text(figures["validation_bpb"], "{:.4f} bpb")),
        ("training loss", finite_text(figures["train_loss"], "{:.4f} nats")),
        ("speed", finite_text(figures["tokens_per_second"], "{:,.0f} tok/s")),
        ("training time", seconds_text(figures["training_seconds"])),
        ("peak memory", bytes_text(figures["peak_memory_bytes"])),
    ]
    return [(label, value) for label, value in shown if value != "n/a"]


def performance(log: RunLog, figures: Mapping[str, Any]) -> list[Block]:
    """Return speed, time, memory and sizes."""
    device = section(log.record, "environment")
    name = device.get("device_name") or device.get("device") or section(log.state, "environment").get("device")
    rows = [
        ("device", short(str(name)) if name else "not recorded"),
        ("speed", finite_text(figures["tokens_per_second"], "{:,.0f} tok/s (median)")),
        ("step", f"{seconds_text(figures['step_seconds'])} (median)"),
        ("training time", seconds_text(figures["training_seconds"])),
        ("evaluation and sampling", seconds_text(figures["evaluation_seconds"])),
        ("saving and other hooks", seconds_text(figures["other_seconds"])),
        ("MFU", finite_text(figures["mfu"], "{:.1%} (median)", "n/a: the peak of this device is not known")),
        ("peak memory", bytes_text(figures["peak_memory_bytes"])),
    ]
    planned, step_seconds = figures["num_steps"], figures["step_seconds"]
    if figures["status"] in ("running", "stopped") and planned and math.isfinite(step_seconds):
        rows.append(("still to go", f"{seconds_text((planned - figures['steps']) * step_seconds)} at this speed"))
    if log.checkpoints:
        newest = log.checkpoints[-1]
        largest = sorted(newest.sizes.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{short(name)} {bytes_text(size)}" for name, size in largest)
        rows.append(("checkpoint", f"{bytes_text(sum(newest.sizes.values()))}: {parts}"))
        kept = ", ".join(f"{saved.step:,}" for saved in log.checkpoints[-6:])
        rows.append(("checkpoints kept", f"{len(log.checkpoints)}, at steps {kept}"))
    return [Table(("", ""), rows)]


def architecture(log: RunLog) -> list[Block]:
    """Return the model: its parameters by role, its blocks, its config."""
    model = section(log.record, "model")
    config = section(model, "config") or section(log.state, "model_config")
    blocks: list[Block] = []
    if not model:
        blocks.append(Paragraph(f"{_NO_RECORD}{'; this is from its newest checkpoint.' if config else '.'}"))
    total = number(model.get("num_parameters"))
    if total > 0:
        counts = [(role, number(count)) for role, count in section(model, "parameters").items()]
        rows = [(role.replace("_", " "), f"{n:,.0f}", f"{n / total:.1%}") for role, n in counts if math.isfinite(n)]
        rows.append(("all", f"{total:,.0f}", "100.0%"))
        blocks.append(Table(("parameters", "number", "share"), rows[:_MOST_ROWS], numeric=True))
    facts = [shape] if (shape := _shape(config)) else []
    for block in objects(model, "blocks")[:6]:
        layers = block.get("layers")
        if isinstance(layers, list):
            facts.append(f"{len(layers)} × {short(str(block.get('description')))}.")
    flops = number(model.get("flops_per_token"))
    if flops > 0:
        facts.append(f"{flops / 1e6:,.1f} MFLOP a token in training.")
    blocks += [Paragraph(fact) for fact in facts]
    if config:
        blocks.append(_fields("model config", config))
    return blocks


def _shape(config: Mapping[str, Any]) -> str:
    sizes = [number(config.get(key)) for key in ("num_layers", "dim", "num_heads", "max_seq_len", "vocab_size")]
    if not all(1 <= size < 1e12 for size in sizes):
        return ""
    layers, dim, heads, context, vocabulary = sizes
    kv_heads = number_text(config.get("num_kv_heads") or int(heads))
    return (
        f"{layers:,.0f} layers, width {dim:,.0f}, {heads:,.0f} heads of {dim / heads:,.0f} ({kv_heads} key/value "
        f"heads), context {context:,.0f}, vocabulary {vocabulary:,.0f}."
    )


def data_and_batch(log: RunLog) -> list[Block]:
    """Return batch, data and environment."""
    record = log.record
    batch, data = section(record, "batch"), section(record, "data")
    rows: list[tuple[str, str]] = []
    if tokens := batch.get("tokens"):
        parts = [batch.get(key) for key in ("micro_batches", "rows", "seq_len")]
        made = f" = {' × '.join(number_text(part) for part in parts)}" if all(parts) else ""
        rows.append(
            ("tokens of a step", f"{number_text(tokens)}{made}{' (micro-batches, rows, positions)' if made else ''}")
        )
    for label, value in (
        ("precision", record.get("precision") or section(log.state, "settings").get("precision")),
        ("tokenizer", data.get("tokenizer")),
        ("vocabulary", data.get("vocab_size")),
        ("data fingerprint", data.get("source_fingerprint") or section(log.state, "loader").get("source_fingerprint")),
        ("gradient clipping", section(record, "settings").get("grad_clip")),
        ("seed", record.get("seed")),
    ):
        if value is not None:
            rows.append((label, number_text(value)))
    epochs = log["epoch"][np.isfinite(log["epoch"])]
    if len(epochs):
        rows.append(("passes over the data", f"{epochs[-1]:,.0f} done, pass {epochs[-1] + 1:,.0f} was running"))
    blocks: list[Block] = [Table(("", ""), rows)] if rows else []
    told = {name: section(record, name) or section(log.state, name) for name in ("environment", "settings")}
    return blocks + [_fields(title, values) for title, values in {"run.json": log.identity, **told}.items() if values]


def optimizer(log: RunLog) -> list[Block]:
    """Return the optimizer's groups with what they were made with."""
    made = section(log.record, "optimizer")
    rows: list[tuple[str, ...]] = []
    for group in objects(made, "groups")[:40]:
        settings = section(group, "settings")
        rest = {key: value for key, value in settings.items() if key not in ("lr", "weight_decay")}
        rows.append(
            (
                f"{short(str(group.get('kind') or ''), 12)} {short(str(group.get('name')), 48)}".strip(),
                number_text(group.get("num_parameters")),
                number_text(settings.get("lr")),
                number_text(settings.get("weight_decay")),
                short(", ".join(f"{key} {value_text(value)}" for key, value in rest.items()), 120),
            )
        )
    if rows:
        text = f"{short(str(made.get('name')))}. Rates are those the schedules multiply."
        return [
            Paragraph(text),
            Table(("group, by its first tensor", "parameters", "lr", "weight decay", "options"), rows),
        ]
    rates = {key: value for key, value in section(log.state, "rates").items() if isinstance(value, dict)}
    rows = [
        (short(name, 60), number_text(values.get("lr")), number_text(values.get("weight_decay")))
        for name, values in list(rates.items())[:40]
    ]
    if rows:
        text = f"{short(str(log.state.get('optimizer_class')))}, with the rates after the newest checkpoint."
        return [Paragraph(text), Table(("group, by its first tensor", "lr", "weight decay"), rows)]
    return [Paragraph(f"{_NO_RECORD}.")]


def phases(log: RunLog) -> list[Block]:
    """Return what the rates did in each stretch between resumes, as it was logged, and how the schedules were made."""
    rows = []
    stretches = log.segments()
    for stretch in stretches[-_MOST_PHASES:]:
        step = log.step[stretch]
        described = [_course(step, log[key][stretch]) for key in ("lr", "weight_decay", "momentum")]
        rows.append((f"{step[0]:,} to {step[-1]:,}", *described))
    blocks: list[Block] = [Table(("steps", "learning rate", "weight decay", "momentum"), rows)] if rows else []
    if len(stretches) > len(rows):
        blocks.append(Paragraph(f"The newest {len(rows)} of {len(stretches):,} phases."))
    for start, record in log.records[-6:]:
        if schedules := section(record, "schedules"):
            blocks.append(_fields(f"schedules from step {start + 1:,}", schedules))
    if not log.records:
        settings = section(log.state, "settings")
        if made := {key: value for key, value in settings.items() if key.startswith("schedule ")}:
            blocks.append(_fields("schedules at the newest checkpoint", made))
    for resume in log.resumes[-6:]:
        changes = [(short(name), value_text(was), value_text(now)) for name, was, now in resume.changes[:40]]
        if changes:
            blocks.append(Table(("changed", "was", "is"), changes, folded=f"resume after step {resume.step:,}"))
    return blocks


def _course(step: Integers, values: Floats) -> str:
    """Say in words how a rate went: the rise, the plateau, the fall."""
    known = np.isfinite(values)
    step, values = step[known], values[known]
    if not len(values):
        return "n/a"
    first, top, last = float(values[0]), float(values.max()), float(values[-1])
    at_top = np.flatnonzero(values >= top - 0.005 * abs(top))
    begin, end = int(at_top[0]), int(at_top[-1])
    if len(at_top) == len(values):
        return f"constant {number_text(top)}"
    parts = [] if begin == 0 else [f"{number_text(first)} rising to {number_text(top)} at step {step[begin]:,}"]
    if begin == 0:
        parts.append(number_text(top))
    if end - begin > 0.03 * len(values) and end < len(values) - 1:
        parts.append(f"held to step {step[end]:,}")
    if end < len(values) - 1:
        parts.append(f"falling to {number_text(last)}")
    return ", ".join(parts)


def progression(log: RunLog) -> list[Block]:
    """Return training loss and validation at a dozen places, with the differences to the row above."""
    validation = {e.step: e.bpb for e in log.validation}
    if not len(log.step):
        return [Paragraph("No step was finished yet.")]
    best = min(validation, key=validation.__getitem__) if validation else None
    places = sorted(validation) or log.step.tolist()
    # A jump hides between two rows unless they stand right before and after it.
    wanted = {best} if best else set()
    for boundary in log.boundaries[-3:]:
        index = bisect.bisect_right(places, boundary)
        wanted |= set(places[max(0, index - 1) : index + 1])
    milestones = _milestones(places, wanted)
    known = np.isfinite(log["loss"])
    steps, losses = log.step[known], log["loss"][known]
    window = mean_window(log)
    means = smooth(losses, window)
    rows = []
    previous = (math.nan, math.nan)
    for step in milestones:
        loss = float(means[place]) if (place := int(np.searchsorted(steps, step, side="right")) - 1) >= 0 else math.nan
        index = max(0, int(np.searchsorted(log.step, step, side="right")) - 1)
        bpb = validation.get(step, math.nan)
        change = finite_text(bpb - previous[1], "{:+.4f}", "")
        measured = (f"{bpb:.4f}{' (best)' if step == best else ''}", change) if validation else ()
        rows.append(
            (
                f"{step:,}",
                count_text(log["tokens"][index]),
                finite_text(loss, "{:.4f}"),
                finite_text(loss - previous[0], "{:+.4f}", ""),
                *measured,
                number_text(float(log["lr"][index])),
            )
        )
        previous = (loss, bpb)
    header = ("step", "tokens", "train loss", "Δ", *(("val bpb", "Δ") if validation else ()), "lr")
    blocks: list[Block] = [Table(header, rows, numeric=True)]
    how = f"Training loss in nats a token, the mean of the last {window} steps." if window > 1 else "In nats a token."
    if len(validation) > len(milestones):
        how += f" {len(milestones)} of {len(validation):,} evaluations, the best and those around a resume among them."
    blocks.append(Paragraph(" ".join([how, *validation_warning([log])])))
    others = sorted({key for e in log.evaluations for key in e.numbers} - {"bpb", "loss", "num_tokens", "num_bytes"})
    last = [(key, [e for e in log.evaluations if key in e.numbers][-1]) for key in others[:30]]
    if last:
        found = [(short(key, 60), number_text(e.numbers[key]), f"{e.step:,}") for key, e in last]
        blocks.append(Table(("other evaluations", "last value", "step"), found, numeric=True))
    return blocks


def validation_warning(logs: Sequence[RunLog]) -> list[str]:
    """Return a warning if bits per byte were measured on different texts."""
    hashes = {e.data_hash for log in logs for e in log.validation if e.data_hash}
    if len(hashes) < 2:
        return []
    return [f"Warning: {len(hashes)} different validation sets were used; their figures cannot be compared."]


def _milestones(steps: list[int], wanted: set[int]) -> list[int]:
    """Choose evenly, the first and the last among them."""
    if len(steps) <= _MOST_ROWS:
        return steps
    places = np.linspace(0, len(steps) - 1, _MOST_ROWS - len(wanted)).round().astype(int)
    return sorted({steps[place] for place in places} | wanted)


def _fields(title: str, values: Mapping[str, Any]) -> Table:
    rows = [(short(str(key), 60), value_text(value)) for key, value in list(values.items())[:_MOST_FIELDS]]
    return Table(("", ""), rows, folded=title)
